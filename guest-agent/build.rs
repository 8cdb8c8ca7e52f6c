//! Lays the program out so that its file can be mapped in pages of 2 MiB: code and constants in one piece, which lies in
//! memory as it does in the file, and ends with a whole page.

use std::env;

const SCRIPT: &str = "whole-pages.ld";

fn main() {
    let folder = env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    let script = format!("-T,{folder}/{SCRIPT}");
    for argument in ["-z,max-page-size=0x200000", "--no-rosegment", &script] {
        println!("cargo::rustc-link-arg-bins=-Wl,{argument}");
    }
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed={SCRIPT}");
}
