//! What KVM's description of a processor depends on.

use std::arch::x86_64::__cpuid_count;

use serde::{Deserialize, Serialize};

/// The APIC's number, in register b of leaf 1: it is that of whichever processor answers.
const NUMBER: u32 = 0xff << 24;

/// The leaves, with their subleaves, that tell a processor from others, and whether the registers after the first count: vendor, model,
/// features, what XSAVE keeps, and the name. Each costs an exit where the host is a VM itself.
const ASKED: [(u32, u32, bool); 9] = [
    (0, 0, true),
    (1, 0, true),
    (7, 0, true),
    (0xd, 0, true),
    // The size that this leaf tells depends on who asks.
    (0xd, 1, false),
    (0x8000_0001, 0, true),
    (0x8000_0002, 0, true),
    (0x8000_0003, 0, true),
    (0x8000_0004, 0, true),
];

/// A host's kernel and processor. Where both are the same KVM says the same of a guest's processors, which takes it a
/// hundred questions to find out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    kernel: [String; 2],
    processor: Vec<[u32; 4]>,
}

impl Host {
    /// This one.
    pub fn here() -> Self {
        let name = rustix::system::uname();
        let kernel = [name.release(), name.version()].map(|text| text.to_string_lossy().into_owned());
        Self { kernel, processor: ASKED.map(answer).to_vec() }
    }
}

fn answer((leaf, subleaf, whole): (u32, u32, bool)) -> [u32; 4] {
    let answer = __cpuid_count(leaf, subleaf);
    let number = if leaf == 1 { NUMBER } else { 0 };
    let [ebx, ecx, edx] = if whole { [answer.ebx & !number, answer.ecx, answer.edx] } else { [0; 3] };
    [answer.eax, ebx, ecx, edx]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_processor_of_a_host_says_the_same() {
        let here = Host::here();
        assert_eq!(here, Host::here());
        assert!(here.processor.iter().any(|answer| answer[1] != 0), "{here:?}");
        assert!(here.kernel.iter().all(|text| !text.is_empty()), "{here:?}");
    }
}
