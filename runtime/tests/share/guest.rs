//! A guest that puts what requests it likes, and whoever serves it its files.

use std::fs;
use std::io;
use std::process::ExitCode;

use runvm::share::{Files, Fresh};
use runvm::vmm::builtin::confinement::enter;
use runvm_vmm::virtio::fs::Fs;
use runvm_vmm::virtio::fs::client::{Client, Opcode, ROOT};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::thread::UnshareFlags;
use virtiofsd::passthrough::{Config, PassthroughFs};

use crate::ground::{BELOW, BOUND, Map, SECRET};
use crate::ways;

/// The files are served as by a VM's process, which has entered the exports.
pub const CLOSED: &str = "closed";
/// The folder of all is served by a process that sees all of the host.
pub const OPEN: &str = "open";

/// How long an answer may be, in bytes: longer than any that is wanted.
const ROOM: u32 = 256;

/// An answer: what was asked for, or an error number.
pub type Answer = Result<Vec<u8>, i32>;

/// The guest.
pub struct Guest {
    client: Client<Fs<Files>>,
    /// What is served.
    pub map: Map,
    breaches: Vec<String>,
}

/// The guest's process: prints what it got.
pub fn main(how: &str, map: &str) -> ExitCode {
    let breaches = serde_json::from_str(map).map_err(Into::into).and_then(|map| try_all(how, map));
    match breaches.and_then(|breaches| Ok(serde_json::to_writer(io::stdout(), &breaches)?)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("the guest cannot begin: {error}");
            ExitCode::FAILURE
        }
    }
}

fn try_all(how: &str, map: Map) -> io::Result<Vec<String>> {
    let closed = how == CLOSED;
    let served = if closed { closed_files(&map)? } else { open_files(&map)? };
    let device = Fs::new("share", served).map_err(io::Error::other)?;
    let mut client = Client::new(device).map_err(io::Error::other)?;
    client.begin().map_err(io::Error::from_raw_os_error)?;
    let mut guest = Guest { client, map, breaches: Vec::new() };
    ways::read(&mut guest);
    ways::write(&mut guest);
    if closed {
        ways::change_what_is_read_only(&mut guest);
        ways::use_devices(&mut guest);
        ways::forge(&mut guest);
        ways::see_what_is_mounted(&mut guest);
    }
    Ok(guest.breaches)
}

/// Becomes what a VM's process is. Below one export something is mounted that is not exported.
fn closed_files(map: &Map) -> io::Result<Files> {
    // SAFETY: the table of descriptors is not among the flags.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    let below = map.folder.join(BOUND).join(BELOW);
    mount("hidden", &below, "tmpfs", MountFlags::empty(), None)?;
    fs::write(below.join("secret"), SECRET)?;
    enter(&map.exports()).map_err(io::Error::other)
}

fn open_files(map: &Map) -> io::Result<Files> {
    let root_dir = map.folder.display().to_string();
    Ok(Fresh::over(PassthroughFs::new(Config { root_dir, ..Config::default() })?))
}

impl Guest {
    /// Puts a request; an answer that has a secret in it is a breach, by that way.
    pub fn ask(&mut self, way: &str, what: Opcode, node: u64, arguments: &[&[u8]]) -> Answer {
        let answer = self.client.request_for(what as u32, node, arguments, ROOM);
        self.look_through(way, &answer);
        answer
    }

    /// The same with any operation.
    pub fn ask_any(&mut self, way: &str, what: u32, node: u64, arguments: &[u8]) {
        let answer = self.client.request_for(what, node, &[arguments], ROOM);
        self.look_through(way, &answer);
    }

    fn look_through(&mut self, way: &str, answer: &Answer) {
        let Ok(answer) = answer else { return };
        if answer.windows(SECRET.len()).any(|part| part == SECRET.as_bytes()) {
            self.breach(format!("{way}: a secret was read"));
        }
    }

    /// Looks a name up; one that leads to what is not the guest's is a breach. The node.
    pub fn look_up(&mut self, way: &str, folder: u64, name: &str) -> Result<u64, i32> {
        let answer = self.ask(way, Opcode::Lookup, folder, &[name.as_bytes(), &[0]])?;
        let number = |at: usize| answer.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map(u64::from_le_bytes);
        let (node, inode) = (number(0).unwrap_or(0), number(40).unwrap_or(0));
        if self.map.outside.contains(&inode) {
            self.breach(format!("{way}: {name:?} leads to inode {inode}"));
        }
        Ok(node)
    }

    /// The node of a path that is there; the root's for none.
    pub fn find(&mut self, path: &str) -> u64 {
        let names = path.split('/').filter(|name| !name.is_empty());
        names.fold(ROOT, |node, name| self.look_up("a plain name", node, name).unwrap_or(0))
    }

    /// Opens and reads whatever a node is.
    pub fn read(&mut self, way: &str, node: u64) {
        if let Ok(handle) = self.open(node, 0) {
            self.read_by(way, node, handle);
        }
    }

    /// Opens a node with flags of open(2): the handle.
    pub fn open(&mut self, node: u64, flags: i32) -> Result<u64, i32> {
        let arguments = [flags.cast_unsigned(), 0].map(u32::to_le_bytes).concat();
        let answer = self.ask("opening", Opcode::Open, node, &[&arguments])?;
        answer.first_chunk().copied().map(u64::from_le_bytes).ok_or(0)
    }

    /// Reads by any handle.
    pub fn read_by(&mut self, way: &str, node: u64, handle: u64) {
        let read = self.client.read(node, handle, 0, ROOM);
        self.look_through(way, &read);
    }

    /// Fails what must not succeed.
    pub fn refused<T>(&mut self, what: &str, answer: Result<T, i32>) {
        if answer.is_ok() {
            self.breach(format!("{what} succeeded"));
        }
    }

    /// Notes what must not be.
    pub fn breach(&mut self, what: String) {
        self.breaches.push(what);
    }
}
