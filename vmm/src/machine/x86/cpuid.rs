//! What a processor says of itself: what KVM supports, with this machine's own topology.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

const X2APIC: u32 = 1 << 21;
const TSC_DEADLINE: u32 = 1 << 24;
const OSXSAVE: u32 = 1 << 27;
const HYPERVISOR: u32 = 1 << 31;
const LEVEL_SMT: u32 = 1;
const LEVEL_CORE: u32 = 2;
const MULTITHREADED: u32 = 1 << 28;

/// The entries for the processor with this index, of `vcpus`: each is a core of its own, in one socket.
///
/// # Errors
/// Where there are more entries than KVM takes.
pub fn of(supported: &CpuId, index: u32, vcpus: u32) -> Result<CpuId, vmm_sys_util::fam::Error> {
    // A KVM without the deadline timer would not name it; where the interrupt controller is KVM's, it has it.
    let topology = |leaf| matches!(leaf, 0xb | 0x1f);
    let mut entries: Vec<_> = supported.as_slice().iter().filter(|entry| !topology(entry.function)).copied().collect();
    for entry in &mut entries {
        adapt(entry, index, vcpus);
    }
    entries.extend([0, 1, 2].map(|level| extended_topology(level, index, vcpus)));
    CpuId::from_entries(&entries)
}

/// Whether two descriptions are of the same processor. What a running one changes of its own (whether the kernel has
/// enabled XSAVE, and how large its area is) does not count.
pub fn same(a: &CpuId, b: &CpuId) -> bool {
    let fixed = |entries: &CpuId| -> Vec<[u32; 6]> {
        let entries = entries.as_slice().iter().filter(|entry| !matches!(entry.function, 0xd | 7));
        entries
            .map(|entry| {
                let ecx = if entry.function == 1 { entry.ecx & !OSXSAVE } else { entry.ecx };
                [entry.function, entry.index, entry.eax, entry.ebx, ecx, entry.edx]
            })
            .collect()
    };
    fixed(a) == fixed(b)
}

fn adapt(entry: &mut kvm_cpuid_entry2, index: u32, vcpus: u32) {
    match entry.function {
        0 => entry.eax = entry.eax.max(0xb),
        1 => {
            entry.ebx = entry.ebx & 0xffff | (vcpus.min(255) << 16) | index << 24;
            entry.ecx |= X2APIC | TSC_DEADLINE | HYPERVISOR;
            entry.edx = if vcpus > 1 { entry.edx | MULTITHREADED } else { entry.edx & !MULTITHREADED };
        }
        // Cores of the socket, and processors that share a cache: each has its own, but the last level.
        4 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 { vcpus.next_power_of_two() - 1 } else { 0 };
            let cores = (vcpus.next_power_of_two() - 1).min(63);
            entry.eax = entry.eax & 0x3fff | sharing.min(0xfff) << 14 | cores << 26;
        }
        0x8000_0008 => entry.ecx = entry.ecx & !0xf0ff | (vcpus - 1).min(255) | bits(vcpus) << 12,
        0x8000_001e => {
            entry.eax = index;
            entry.ebx = index;
            entry.ecx = 0;
        }
        _ => {}
    }
}

fn extended_topology(level: u32, index: u32, vcpus: u32) -> kvm_cpuid_entry2 {
    let (eax, ebx, kind) = match level {
        0 => (0, 1, LEVEL_SMT),
        1 => (bits(vcpus), vcpus, LEVEL_CORE),
        _ => (0, 0, 0),
    };
    kvm_cpuid_entry2 {
        function: 0xb,
        index: level,
        flags: kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax,
        ebx,
        ecx: level | kind << 8,
        edx: index,
        ..Default::default()
    }
}

/// How many bits the numbers of so many processors take.
fn bits(vcpus: u32) -> u32 {
    vcpus.next_power_of_two().trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_processor_has_its_own_number() {
        let entry = |function| kvm_cpuid_entry2 { function, ebx: 0xffff_1234, ..Default::default() };
        let supported = CpuId::from_entries(&[entry(0), entry(1), entry(0xb)]).unwrap();
        let ours = of(&supported, 2, 3).unwrap();
        let find = |function, index| {
            ours.as_slice().iter().find(|entry| entry.function == function && entry.index == index).copied().unwrap()
        };
        assert_eq!(find(1, 0).ebx, 0x0203_1234);
        assert_eq!(find(1, 0).ecx & HYPERVISOR, HYPERVISOR);
        assert_eq!((find(0xb, 1).eax, find(0xb, 1).ebx, find(0xb, 1).edx), (2, 3, 2));
        assert_eq!(ours.as_slice().iter().filter(|entry| entry.function == 0xb).count(), 3);
    }
}
