//! Generates the messages of `proto/`, in pure Rust: no `protoc` is needed.

use std::path::Path;
use std::{env, fs, io};

use ttrpc_codegen::Codegen;

const FILES: [&str; 3] = ["options", "streaming", "transfer"];

fn main() -> io::Result<()> {
    println!("cargo:rerun-if-changed=proto");
    let out_dir = env::var("OUT_DIR").map_err(io::Error::other)?;
    let inputs = FILES.map(|name| format!("proto/{name}.proto"));
    Codegen::new().out_dir(&out_dir).inputs(inputs).include("proto").rust_protobuf().run()?;
    // `include!` takes no inner attributes, and the generator writes some.
    for name in FILES {
        let file = Path::new(&out_dir).join(name).with_extension("rs");
        let lines = fs::read_to_string(&file)?;
        let kept = lines.split_inclusive('\n').filter(|line| !line.starts_with("#![") && !line.starts_with("//!"));
        fs::write(file, kept.collect::<String>())?;
    }
    Ok(())
}
