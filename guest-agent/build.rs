//! Lays the program out so that its file can be mapped in pages of 2 MiB: code and constants in one piece, which lies in
//! memory as it does in the file.

fn main() {
    for argument in ["-z,max-page-size=0x200000", "--no-rosegment"] {
        println!("cargo::rustc-link-arg-bins=-Wl,{argument}");
    }
    println!("cargo::rerun-if-changed=build.rs");
}
