//! The table by which a kernel without ACPI finds processors and interrupts, after Intel's MultiProcessor Specification
//! 1.4, chapter 4.
//!
//! It lies at the very beginning of memory: that is where kernels look first, and each further kilobyte that they have to
//! search costs milliseconds.

use vm_memory::{Bytes as _, GuestAddress, GuestMemoryError};

use crate::Memory;

/// As many as the first kilobyte, which is searched, has room for.
pub const MAX_VCPUS: u32 = 32;

const APIC: u32 = 0xfee0_0000;
const IOAPIC: u32 = 0xfec0_0000;
const IOAPIC_PINS: u8 = 24;
const APIC_VERSION: u8 = 0x14;
const SPECIFICATION: u8 = 4;

const POINTER_LENGTH: usize = 16;
const HEADER_LENGTH: usize = 44;

const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IO_APIC: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;

const ENABLED: u8 = 1;
const BOOT_PROCESSOR: u8 = 2;
/// All local APICs.
const EVERYONE: u8 = 0xff;
const ORDINARY: u8 = 0;
const NMI: u8 = 1;
const EXTERNAL: u8 = 3;

/// Writes the table for this many processors, at most [`MAX_VCPUS`].
pub fn write(memory: &Memory, vcpus: u32) -> Result<(), GuestMemoryError> {
    memory.write_slice(&table(vcpus.min(MAX_VCPUS) as u8), GuestAddress(0))
}

fn table(vcpus: u8) -> Vec<u8> {
    let mut entries = Vec::new();
    let mut count = 0u16;
    let mut entry = |bytes: &[u8]| {
        entries.extend_from_slice(bytes);
        count += 1;
    };
    for id in 0..vcpus {
        let flags = ENABLED | if id == 0 { BOOT_PROCESSOR } else { 0 };
        let signature = 0x600u32.to_le_bytes();
        // FPU and APIC.
        let features = 0x201u32.to_le_bytes();
        entry(&[&[PROCESSOR, id, APIC_VERSION, flags], &signature[..], &features, &[0; 8]].concat());
    }
    let ioapic = vcpus;
    entry(&[&[BUS, 0], &b"ISA   "[..]].concat());
    entry(&[&[IO_APIC, ioapic, APIC_VERSION, ENABLED], &IOAPIC.to_le_bytes()[..]].concat());
    for pin in 0..IOAPIC_PINS {
        entry(&[IO_INTERRUPT, ORDINARY, 0, 0, 0, pin, ioapic, pin]);
    }
    entry(&[LOCAL_INTERRUPT, EXTERNAL, 0, 0, 0, 0, 0, 0]);
    entry(&[LOCAL_INTERRUPT, NMI, 0, 0, 0, 0, EVERYONE, 1]);

    let length = (HEADER_LENGTH + entries.len()) as u16;
    let mut header = Vec::with_capacity(length.into());
    header.extend_from_slice(b"PCMP");
    header.extend_from_slice(&length.to_le_bytes());
    header.extend_from_slice(&[SPECIFICATION, 0]);
    header.extend_from_slice(b"RUNVM   MICROVM     ");
    header.extend_from_slice(&[0; 6]);
    header.extend_from_slice(&count.to_le_bytes());
    header.extend_from_slice(&APIC.to_le_bytes());
    header.extend_from_slice(&[0; 4]);
    header.extend_from_slice(&entries);
    header[7] = checksum(&header);

    let mut pointer = Vec::with_capacity(POINTER_LENGTH);
    pointer.extend_from_slice(b"_MP_");
    pointer.extend_from_slice(&(POINTER_LENGTH as u32).to_le_bytes());
    pointer.extend_from_slice(&[1, SPECIFICATION, 0, 0, 0, 0, 0, 0]);
    pointer[10] = checksum(&pointer);
    pointer.extend_from_slice(&header);
    pointer
}

/// What makes all bytes add up to zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_adds_up_and_fits_where_kernels_look() {
        for vcpus in [1, 2, MAX_VCPUS as u8] {
            let table = table(vcpus);
            let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
            assert_eq!((sum(&table[..POINTER_LENGTH]), sum(&table[POINTER_LENGTH..])), (0, 0));
            assert!(table.len() <= 1024, "{}", table.len());
            let length = u16::from_le_bytes([table[POINTER_LENGTH + 4], table[POINTER_LENGTH + 5]]);
            assert_eq!(usize::from(length), table.len() - POINTER_LENGTH);
            let count = u16::from_le_bytes([table[POINTER_LENGTH + 34], table[POINTER_LENGTH + 35]]);
            assert_eq!(count, u16::from(vcpus) + 2 + 24 + 2);
        }
    }
}
