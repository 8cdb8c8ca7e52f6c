//! Generates the messages and the service from `proto/agent.proto`, in pure Rust: no `protoc` is needed.

use std::path::Path;
use std::{env, fs, io};

use ttrpc_codegen::{Codegen, Customize};

fn main() -> io::Result<()> {
    println!("cargo:rerun-if-changed=proto");
    let out_dir = env::var("OUT_DIR").map_err(io::Error::other)?;
    Codegen::new()
        .out_dir(&out_dir)
        .input("proto/agent.proto")
        .include("proto")
        .rust_protobuf()
        .customize(Customize { async_all: true, ..Default::default() })
        .run()?;
    for file in ["agent.rs", "agent_ttrpc.rs"] {
        without_inner_attributes(&Path::new(&out_dir).join(file))?;
    }
    Ok(())
}

/// `include!` takes no inner attributes, and the generators write some.
fn without_inner_attributes(file: &Path) -> io::Result<()> {
    let lines = fs::read_to_string(file)?;
    let kept: String =
        lines.split_inclusive('\n').filter(|line| !line.starts_with("#![") && !line.starts_with("//!")).collect();
    fs::write(file, kept)
}
