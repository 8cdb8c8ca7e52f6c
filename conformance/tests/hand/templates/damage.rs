//! Templates that are not as they were written. Whatever is wrong with one, a container runs as it would without it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use conformance::bundle::Hand;
use conformance::suite::expect_equal;
use conformance::{Case, Outcome, case};

use super::{Templates, choosing_freely, limit};
use crate::refused::sentence;

pub(super) fn cases() -> Vec<Case<Hand>> {
    vec![case!(a_damaged_template_is_replaced), case!(a_template_whose_guest_is_garbage_is_replaced)]
}

/// What is done to a template's folder, and whether that can be told before a machine is made of it.
type Damage = (&'static str, fn(&Path) -> Result<()>);

/// With each, `require` is refused in one sentence, and `auto` boots and makes another.
const DAMAGES: [Damage; 14] = [
    ("its mark is another's", |folder| flip(&folder.join("state"), 0)),
    ("its version is another's", |folder| flip(&folder.join("state"), 8)),
    ("its length is wrong", |folder| flip(&folder.join("state"), 12)),
    ("its checksum is wrong", |folder| flip(&folder.join("state"), 20)),
    ("a bit of its state is wrong", |folder| flip(&folder.join("state"), 2000)),
    ("its state is short", |folder| shorten(&folder.join("state"), 1000)),
    ("its state is empty", |folder| shorten(&folder.join("state"), 0)),
    ("its state is garbage", |folder| Ok(fs::write(folder.join("state"), garbage(30_000))?)),
    ("its state is not there", |folder| Ok(fs::remove_file(folder.join("state"))?)),
    ("its memory is short", |folder| shorten(&folder.join("memory"), 10 << 20)),
    ("its memory is empty", |folder| shorten(&folder.join("memory"), 0)),
    ("its memory is not there", |folder| Ok(fs::remove_file(folder.join("memory"))?)),
    ("its shape is garbage", |folder| Ok(fs::write(folder.join("shape.json"), garbage(300))?)),
    ("its shape is not there", |folder| Ok(fs::remove_file(folder.join("shape.json"))?)),
];

/// With these the machine is made, and its guest goes nowhere.
const GARBAGE: [Damage; 2] = [
    ("its memory is garbage", |folder| {
        let memory = File::options().write(true).open(folder.join("memory"))?;
        let (length, chunk) = (memory.metadata()?.len(), garbage(1 << 20));
        (0..length).step_by(chunk.len()).try_for_each(|at| Ok(memory.write_all_at(&chunk, at)?))
    }),
    ("its memory is all zeros", |folder| {
        let memory = File::options().write(true).open(folder.join("memory"))?;
        let length = memory.metadata()?.len();
        memory.set_len(0)?;
        Ok(memory.set_len(length)?)
    }),
];

fn a_damaged_template_is_replaced(h: &Hand) -> Result<Outcome> {
    replaced(h, &DAMAGES)
}

fn a_template_whose_guest_is_garbage_is_replaced(h: &Hand) -> Result<Outcome> {
    replaced(h, &GARBAGE)
}

fn replaced(h: &Hand, damages: &[Damage]) -> Result<Outcome> {
    let templates = Templates::of(h);
    let bundle = h.bundle_with(&["echo", "ran"], |config| limit(config, 64, 1))?;
    let mut last = templates.run(&bundle)?;
    for (what, damage) in damages.iter().filter(|_| templates.asked()) {
        damage(&templates.only()?)?;
        // By a runvm that may choose QEMU's emulation, as one does that was not told anything.
        let require = templates.run_cmd(&bundle).env("RUNVM_TEMPLATE", "require");
        let refused = choosing_freely(require, h).run()?;
        let said = sentence(h, &refused.stderr).to_owned();
        expect_equal(what, (refused.code, refused.stdout.as_str()), (1, "")).with_context(|| said.clone())?;
        ensure!(said.contains("template") && !said.contains('\n'), "{what}: not a clear sentence: {said}");
        bundle.expect_no_trace()?;

        last = templates.run(&bundle).context(*what)?;
        ensure!(last.reached("machine booted") && last.reached("template made"), "{what}: {:?}", last.beginning());
        // One that lacks a file is none.
        let warned = last.warnings().iter().any(|warning| warning.contains("template"));
        ensure!(warned || said.contains("there is no template"), "{what}: no warning: {:?}", last.log);
        templates.expect_only(&templates.keys()?)?;
        last = templates.run(&bundle)?;
        last.expect_forked().context(*what)?;
    }
    Ok(Outcome::new().see_output("run", &last.output))
}

fn flip(path: &Path, offset: u64) -> Result<()> {
    let file = File::options().read(true).write(true).open(path)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset)?;
    Ok(file.write_all_at(&[byte[0] ^ 0x10], offset)?)
}

fn shorten(path: &Path, length: u64) -> Result<()> {
    Ok(File::options().write(true).open(path)?.set_len(length)?)
}

/// Bytes that mean nothing, the same each time.
fn garbage(length: usize) -> Vec<u8> {
    let next = |state: &u32| Some(state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223));
    std::iter::successors(Some(7), next).map(|state| state.to_be_bytes()[0]).take(length).collect()
}
