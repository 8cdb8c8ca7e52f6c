//! What a processor says of itself: what KVM supports, with this machine's own topology.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

const X2APIC: u32 = 1 << 21;
const TSC_DEADLINE: u32 = 1 << 24;
const OSXSAVE: u32 = 1 << 27;
const HYPERVISOR: u32 = 1 << 31;
const LEVEL_SMT: u32 = 1;
const LEVEL_CORE: u32 = 2;
const MULTITHREADED: u32 = 1 << 28;
const DESCRIPTORS: u32 = 2;
/// The descriptor in leaf 2 that points to leaf 4.
const ELSEWHERE: u8 = 0xff;
const CACHES: u32 = 4;
const XSTATE: u32 = 0xd;

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

/// Says the same in words that a C library understands with fewer questions: under PVM the answer to each is an exit of up to
/// 33 µs, and each program begins with them.
///
/// The further forms of XSAVE go, which the kernel of a PVM guest does without: with the compacted ones a library asks for each
/// component how large it is. All go, as a KVM may add to what is said of them that programs can use the compacted ones, but
/// not where nothing is said. And leaf 2 has descriptors of the caches instead of the one that points to leaf 4, which a
/// library reads from its beginning for each of a dozen things that it wants to know.
pub fn answer_briefly(supported: &mut CpuId) {
    supported.retain(|entry| (entry.function, entry.index) != (XSTATE, 1));
    let Some(caches) = cache_descriptors(supported.as_slice()) else { return };
    for entry in supported.as_mut_slice().iter_mut().filter(|entry| entry.function == DESCRIPTORS) {
        describe_caches(entry, &caches);
    }
}

/// A kind of cache: its level, its type (1 for data, 2 for instructions, 3 for both), and the descriptors of leaf 2 with 64
/// bytes in a line, by size in KiB. The source is the table of leaf 2 in Intel's manual (volume 2A, CPUID).
type Kind = (u32, u32, &'static [(u32, u8)]);

const KINDS: [Kind; 4] = [
    (1, 1, &[(32, 0x2c), (24, 0x0e), (16, 0x60)]),
    (1, 2, &[(32, 0x30)]),
    (2, 3, &[(2048, 0x7d), (1024, 0x7c), (512, 0x7b), (256, 0x7a)]),
    (3, 3, &[(24 << 10, 0xec), (18 << 10, 0xeb), (12 << 10, 0xea), (8 << 10, 0xe4), (4 << 10, 0xe3), (2 << 10, 0xe2)]),
];

/// What leaf 2 has for the caches that leaf 4 tells of: for each the largest that is no larger, as there are none for today's.
/// `None` where one is smaller than all.
fn cache_descriptors(entries: &[kvm_cpuid_entry2]) -> Option<Vec<u8>> {
    let caches = entries.iter().filter(|entry| entry.function == CACHES && entry.eax & 0x1f != 0);
    caches
        .map(|entry| {
            let (level, kind) = (entry.eax >> 5 & 7, entry.eax & 0x1f);
            let (ways, partitions, line) = (entry.ebx >> 22, entry.ebx >> 12 & 0x3ff, entry.ebx & 0xfff);
            let bytes = [ways, partitions, line, entry.ecx].iter().map(|&part| u64::from(part) + 1).product::<u64>();
            let (.., sizes) = KINDS.iter().find(|known| (known.0, known.1) == (level, kind))?;
            Some(sizes.iter().find(|(size, _)| u64::from(*size) << 10 <= bytes)?.1)
        })
        .collect()
}

/// Puts the caches' descriptors in the place of the one that points to leaf 4.
fn describe_caches(entry: &mut kvm_cpuid_entry2, caches: &[u8]) {
    let mut registers = [entry.eax, entry.ebx, entry.ecx, entry.edx].map(u32::to_le_bytes);
    if !registers.iter().flatten().skip(1).any(|&byte| byte == ELSEWHERE) {
        return;
    }
    let mut caches = caches.iter();
    // The highest bit of a register says that it has no descriptors; the lowest byte of all, how often the leaf is to be read.
    let valid = registers.iter_mut().filter(|register| register[3] & 0x80 == 0);
    let places = valid.flat_map(|register| &mut register[..3]).skip(1).filter(|byte| matches!(**byte, 0 | ELSEWHERE));
    for place in places {
        *place = caches.next().copied().unwrap_or(0);
    }
    if caches.next().is_none() {
        [entry.eax, entry.ebx, entry.ecx, entry.edx] = registers.map(u32::from_le_bytes);
    }
}

/// Whether two descriptions are of the same processor. What a running one changes of its own (whether the kernel has
/// enabled XSAVE, and how large its area is) does not count.
pub fn same(a: &CpuId, b: &CpuId) -> bool {
    let fixed = |entries: &CpuId| -> Vec<[u32; 6]> {
        let entries = entries.as_slice().iter().filter(|entry| !matches!(entry.function, XSTATE | 7));
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

    fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    fn briefly(entries: &[kvm_cpuid_entry2]) -> Vec<[u32; 4]> {
        let mut entries = CpuId::from_entries(entries).unwrap();
        answer_briefly(&mut entries);
        entries.as_slice().iter().map(|entry| [entry.eax, entry.ebx, entry.ecx, entry.edx]).collect()
    }

    #[test]
    fn what_is_hidden_of_xsave_is_its_further_forms() {
        let entries = [0, 1, 2].map(|index| leaf(XSTATE, index, [index, 576, 0, 0]));
        assert_eq!(briefly(&entries), [[0, 576, 0, 0], [2, 576, 0, 0]]);
    }

    #[test]
    fn caches_have_descriptors_instead_of_a_pointer() {
        // 48 KiB of data, 64 of instructions, 2 MiB, 480 MiB, and the end.
        let caches = [
            leaf(CACHES, 0, [0x121, 0x02c0_003f, 0x3f, 0]),
            leaf(CACHES, 1, [0x122, 0x03c0_003f, 0x3f, 0]),
            leaf(CACHES, 2, [0x143, 0x03c0_003f, 0x7ff, 0]),
            leaf(CACHES, 3, [0x163, 0x03c0_003f, 0x7_7fff, 0]),
            leaf(CACHES, 4, [0; 4]),
        ];
        let with =
            |caches: &[kvm_cpuid_entry2], registers| briefly(&[&[leaf(DESCRIPTORS, 0, registers)], caches].concat())[0];
        assert_eq!(with(&caches, [0x00fe_ff01, 0xf0, 0, 0]), [0x00fe_2c01, 0x007d_30f0, 0xec, 0]);
        assert_eq!(with(&caches, [0x00fe_ff01, 0x8000_0000, 0, 0]), [0x00fe_2c01, 0x8000_0000, 0x00ec_7d30, 0]);
        // Without the pointer nothing is missing, and where a cache is too small nothing fits.
        let old = [0x0030_2c01, 0x7d, 0, 0];
        assert_eq!(with(&caches, old), old);
        let pointer = [0x00fe_ff01, 0xf0, 0, 0];
        assert_eq!(with(&[leaf(CACHES, 0, [0x121, 0x3f, 0, 0])], pointer), pointer);
    }
}
