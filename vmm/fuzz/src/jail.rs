//! A thread that has no files but those in a small file system of its own.
//!
//! A guest's names reach the kernel as they are, with all `..` in them: in earnest the share is all that the process
//! sees. A fuzzer has to see its corpus, so only the thread that serves the share is locked up, with no more
//! capabilities than in earnest.

use std::any::Any;
use std::cell::OnceCell;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use runvm_vmm::confinement::FILE_CAPABILITIES;
use rustix::fs::CWD;
use rustix::mount::{
    MountFlags, MountPropagationFlags, OpenTreeFlags, UnmountFlags, mount, mount_change, open_tree, unmount,
};
use rustix::process::{chdir, pivot_root};
use rustix::thread::{CapabilitySet, CapabilitySets, UnshareFlags, capabilities, set_capabilities, unshare_unsafe};

/// Where the input in progress is written to: a fuzzer that ends in the jail cannot write it anywhere else.
const RECORD: &str = "RUNVM_FUZZ_RECORD";

/// Where the thread's file system is for a moment.
const STAGE: &str = "/proc";

type Outcome = Result<(), Box<dyn Any + Send>>;

struct Jail {
    inputs: Sender<Vec<u8>>,
    outcomes: Receiver<Outcome>,
    record: Option<File>,
}

thread_local! {
    static JAIL: OnceCell<Jail> = const { OnceCell::new() };
    static DESCRIPTORS: OnceCell<OwnedFd> = const { OnceCell::new() };
}

/// Does `work` in the jail, which is empty before.
#[expect(clippy::expect_used, reason = "a fuzzer ends where it cannot fuzz")]
pub fn run(work: fn(&[u8]), data: &[u8]) {
    JAIL.with(|jail| {
        let jail = jail.get_or_init(|| Jail::new(work).expect("a thread and a file"));
        if let Some(record) = &jail.record {
            record.set_len(0).and_then(|()| record.write_all_at(data, 0)).expect("a record of the input");
        }
        jail.inputs.send(data.to_vec()).expect("a thread that lives");
        if let Err(panic) = jail.outcomes.recv().expect("a thread that lives") {
            resume_unwind(panic);
        }
    });
}

/// `/proc/self/fd`, for those who are in the jail.
pub fn own_descriptors() -> Option<OwnedFd> {
    DESCRIPTORS.with(|descriptors| descriptors.get().and_then(|descriptors| descriptors.try_clone().ok()))
}

impl Jail {
    #[expect(clippy::expect_used, reason = "without the jail there must be no fuzzing")]
    fn new(work: fn(&[u8])) -> io::Result<Self> {
        let (inputs, received) = channel::<Vec<u8>>();
        let (sender, outcomes) = channel();
        let record = std::env::var_os(RECORD).map(File::create).transpose()?;
        thread::Builder::new().name("jail".to_owned()).spawn(move || {
            enter().expect("a jail, which takes root");
            for data in received {
                let outcome = catch_unwind(AssertUnwindSafe(|| work(&data)));
                clear().expect("an empty jail");
                if sender.send(outcome).is_err() {
                    break;
                }
            }
        })?;
        Ok(Self { inputs, outcomes, record })
    }
}

fn enter() -> io::Result<()> {
    // SAFETY: the table of descriptors stays shared.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) }?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let descriptors = open_tree(CWD, "/proc/self/fd", flags)?;
    DESCRIPTORS.with(|cell| drop(cell.set(descriptors)));
    let inert = MountFlags::NODEV | MountFlags::NOSUID | MountFlags::NOEXEC;
    mount("share", STAGE, "tmpfs", inert, c"size=16m,nr_inodes=4k")?;
    chdir(STAGE)?;
    pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    chdir("/")?;
    let kept = capabilities(None)?.permitted & FILE_CAPABILITIES;
    set_capabilities(None, CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() })?;
    Ok(())
}

fn clear() -> io::Result<()> {
    for entry in fs::read_dir("/")? {
        let entry = entry?;
        if entry.file_type()?.is_dir() { fs::remove_dir_all(entry.path())? } else { fs::remove_file(entry.path())? }
    }
    Ok(())
}
