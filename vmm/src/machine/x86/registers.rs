//! A processor's registers when it enters a kernel.

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;

use super::boot::Entry;

const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;
const DATA: u8 = 0x3;
const CODE: u8 = 0xb;
const BUSY_TASK: u8 = 0xb;

const CR0_PROTECTED: u64 = 1;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PHYSICAL_ADDRESS_EXTENSION: u64 = 1 << 5;
const EFER_LONG_MODE: u64 = 1 << 8 | 1 << 10;
const FLAGS: u64 = 2;
const STACK: u64 = 0x8ff0;

const MISC_ENABLE: (u32, u64) = (0x1a0, 1);
/// All memory is cached, unless a page table says otherwise.
const MTRR_DEFAULT: (u32, u64) = (0x2ff, 1 << 11 | 6);

/// Lets the first processor begin in a kernel; the others wait to be started by it.
pub fn set(vcpu: &VcpuFd, entry: Option<Entry>) -> Result<(), kvm_ioctls::Error> {
    let mut msrs = Vec::new();
    for (index, data) in [MISC_ENABLE, MTRR_DEFAULT] {
        msrs.push(kvm_msr_entry { index, data, ..Default::default() });
    }
    // A KVM that does not have one of these goes without it: none is needed to boot.
    if let Ok(msrs) = Msrs::from_entries(&msrs) {
        vcpu.set_msrs(&msrs)?;
    }
    let Some(entry) = entry else { return Ok(()) };
    let mut special = vcpu.get_sregs()?;
    let (code, data) = (segment(CODE_SELECTOR, CODE), segment(DATA_SELECTOR, DATA));
    special.cs = kvm_segment { l: 1, db: 0, ..code };
    [special.ds, special.es, special.fs, special.gs, special.ss] = [data; 5];
    special.tr = kvm_segment { s: 0, db: 0, g: 0, limit: 0x67, ..segment(TASK_SELECTOR, BUSY_TASK) };
    (special.gdt.base, special.gdt.limit) = (entry.gdt.0, entry.gdt.1 - 1);
    (special.idt.base, special.idt.limit) = (0, 0);
    special.cr0 |= CR0_PROTECTED | CR0_PAGING;
    special.cr3 = entry.page_tables;
    special.cr4 |= CR4_PHYSICAL_ADDRESS_EXTENSION;
    special.efer |= EFER_LONG_MODE;
    vcpu.set_sregs(&special)?;
    vcpu.set_regs(&kvm_regs {
        rflags: FLAGS,
        rip: entry.instruction,
        rsi: entry.parameters,
        rsp: STACK,
        ..Default::default()
    })
}

fn segment(selector: u16, type_: u8) -> kvm_segment {
    kvm_segment { base: 0, limit: u32::MAX, selector, type_, present: 1, db: 1, s: 1, g: 1, ..Default::default() }
}
