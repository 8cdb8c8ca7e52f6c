#![no_main]
#![expect(missing_docs, reason = "libFuzzer's macro")]

libfuzzer_sys::fuzz_target!(|data: &[u8]| runvm_vmm_fuzz::bundle::run(data));
