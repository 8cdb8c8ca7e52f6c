//! The targets as tests: inputs that once found something, and some that mean nothing.

use std::fs;
use std::path::Path;

type Target = fn(&[u8]);

const TARGETS: [(&str, Target); 10] = [
    ("balloon", crate::balloon::run),
    ("block", crate::block::run),
    ("bundle", crate::bundle::run),
    ("channel", crate::channel::run),
    ("fs", crate::fs::run),
    ("net", crate::net::run),
    ("registers", crate::registers::run),
    ("rng", crate::rng::run),
    ("snapshot", crate::snapshot::run),
    ("vsock", crate::vsock::run),
];

/// What found something that has been repaired, by target: every fuzzer begins with it.
#[test]
fn seeds_pass() {
    for (name, run) in TARGETS {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds").join(name);
        let Ok(seeds) = fs::read_dir(folder) else { continue };
        for seed in seeds {
            run(&fs::read(seed.unwrap().path()).unwrap());
        }
    }
}

#[test]
fn any_bytes_pass() {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut byte = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 24) as u8
    };
    for round in 0..64 {
        let data: Vec<u8> = (0..round * 16).map(|_| byte()).collect();
        TARGETS.iter().for_each(|(_, run)| run(&data));
    }
}
