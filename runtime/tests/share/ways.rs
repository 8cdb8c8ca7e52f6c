//! The ways out of the share, and into what may only be read.

use nix::libc;
use runvm_vmm::virtio::fs::client::{Opcode, ROOT};

use crate::ground::{BELOW, BOUND, READ_ONLY};
use crate::guest::{Answer, Guest};

/// Farther up than any folder is deep.
const UP: &str = "../../../../../../../../../../../..";

/// To what is outside: by which way, and a name.
fn names(guest: &Guest) -> Vec<(&'static str, String)> {
    let secret = guest.map.secret().display().to_string();
    vec![
        ("a name", "outside/secret".to_owned()),
        ("..", "..".to_owned()),
        ("..", "../..".to_owned()),
        ("a path", "../outside/secret".to_owned()),
        ("a path", "folder/../../outside/secret".to_owned()),
        ("a path", format!("{UP}{secret}")),
        ("a path", secret),
        ("a path", "/".to_owned()),
        ("a link", "up/outside/secret".to_owned()),
        ("a link", "up".to_owned()),
        ("a link", "absolute".to_owned()),
        ("a link", "relative".to_owned()),
        ("/proc", "/proc/self/root".to_owned()),
        ("/proc", "/proc/self/fd/0".to_owned()),
        ("/proc", format!("/proc/self/root{}", guest.map.secret().display())),
        ("no name", String::new()),
    ]
}

/// Names that lead out, from everywhere, to be read.
pub fn read(guest: &mut Guest) {
    let inside = guest.find("writable");
    let mut folders = vec![ROOT, inside];
    for name in ["folder", "up", "absolute", "file", "fifo"] {
        folders.extend(guest.look_up("a plain name", inside, name));
    }
    for folder in folders {
        for (way, name) in names(guest) {
            let Ok(node) = guest.look_up(way, folder, &name) else { continue };
            guest.read(way, node);
            // A folder that should not be reached tells what is in it.
            for name in ["secret", "outside", "../outside"] {
                let Ok(node) = guest.look_up(way, node, name) else { continue };
                guest.read(way, node);
            }
        }
    }
}

/// Names that lead out, to be made, moved to, linked to and removed. Each request is put with a plain name too, where
/// it has to do what it says.
pub fn write(guest: &mut Guest) {
    let folder = guest.find("writable");
    let file = guest.find("writable/file");
    for (number, request) in requests(file, folder).into_iter().enumerate() {
        let plain = format!("plain-{number}");
        let (what, before, after) = &request;
        let done = guest.ask("a plain name", *what, folder, &[before, plain.as_bytes(), &[0], after]);
        if let Err(errno) = done {
            guest.breach(format!("{what:?} with a plain name failed: error {errno}"));
        }
        for (way, name) in names(guest).into_iter().chain(targets(guest)) {
            for node in [folder, ROOT] {
                // Most fail; what they have done is seen by the owner of the ground.
                let _ = guest.ask(way, *what, node, &[before, name.as_bytes(), &[0], after]);
            }
        }
    }
    for (way, name) in targets(guest) {
        for what in [Opcode::Unlink, Opcode::Rmdir] {
            let _ = guest.ask(way, what, folder, &[name.as_bytes(), &[0]]);
        }
        // From there to here.
        let here = [&folder.to_le_bytes()[..], name.as_bytes(), b"\0stolen\0"];
        let _ = guest.ask(way, Opcode::Rename, folder, &here);
        let stolen = guest.look_up(way, folder, "stolen");
        guest.refused("moving a file into the share", stolen);
    }
    links_of_its_own(guest, folder);
}

/// What is outside and could be changed, and places there that are free.
fn targets(guest: &Guest) -> Vec<(&'static str, String)> {
    let outside = guest.map.folder.join("outside").display().to_string();
    vec![
        ("a path", "../outside/new".to_owned()),
        ("a path", "../outside/doomed".to_owned()),
        ("a path", "../outside/secret".to_owned()),
        ("a link", "up/outside/new".to_owned()),
        ("a link", "up/outside/doomed".to_owned()),
        ("a path", format!("{outside}/new")),
        ("a path", format!("{UP}{outside}/doomed")),
    ]
}

/// Requests that make a name: what comes before it, and after it.
fn requests(file: u64, folder: u64) -> Vec<(Opcode, Vec<u8>, Vec<u8>)> {
    let create = |flags: i32| {
        let flags = (flags | libc::O_CREAT).cast_unsigned();
        [flags, libc::S_IFREG | 0o666, 0, 0].map(u32::to_le_bytes).concat()
    };
    let node = |kind: u32| [kind | 0o666, libc::makedev(1, 5) as u32, 0, 0].map(u32::to_le_bytes).concat();
    vec![
        (Opcode::Create, create(libc::O_RDWR), Vec::new()),
        (Opcode::Create, create(libc::O_RDWR | libc::O_TRUNC), Vec::new()),
        (Opcode::Mknod, node(libc::S_IFREG), Vec::new()),
        (Opcode::Mkdir, [0o777u32, 0].map(u32::to_le_bytes).concat(), Vec::new()),
        (Opcode::Symlink, Vec::new(), b"target\0".to_vec()),
        (Opcode::Link, file.to_le_bytes().to_vec(), Vec::new()),
        // The last, since the file is then elsewhere.
        (Opcode::Rename, [&folder.to_le_bytes()[..], b"file\0"].concat(), Vec::new()),
    ]
}

/// Links that the guest makes itself, and further names of them.
fn links_of_its_own(guest: &mut Guest, folder: u64) {
    let secret = guest.map.secret().display().to_string();
    let made = guest.ask("a link", Opcode::Symlink, folder, &[b"mine\0", secret.as_bytes(), &[0]]);
    if made.is_err() {
        guest.breach(format!("a link could not be made: {made:?}"));
    }
    for name in ["mine", "absolute", "relative"] {
        let Ok(link) = guest.look_up("a link", folder, name) else { continue };
        let hard = format!("hard-{name}\0");
        let _ = guest.ask("a hard link", Opcode::Link, folder, &[&link.to_le_bytes(), hard.as_bytes()]);
        for node in [Ok(link), guest.look_up("a hard link", folder, hard.trim_end_matches('\0'))].into_iter().flatten()
        {
            for flags in [libc::O_RDONLY, libc::O_RDWR, libc::O_RDWR | libc::O_TRUNC, libc::O_PATH] {
                let opened = guest.open(node, flags);
                guest.refused(&format!("opening the link {name}"), opened);
            }
            let _ = guest.ask("a link", Opcode::Setattr, node, &[&truncation()]);
        }
    }
}

/// A change of the size to 0.
fn truncation() -> Vec<u8> {
    const SIZE: u32 = 1 << 3;
    [&SIZE.to_le_bytes()[..], &[0; 84]].concat()
}

/// Everything that changes something, in an export that may only be read and in the tree around the exports.
pub fn change_what_is_read_only(guest: &mut Guest) {
    let folder = guest.find(READ_ONLY);
    let file = guest.find("read-only/file");
    let writable = guest.find("writable");
    let ours = guest.find("writable/file");
    for place in [folder, ROOT] {
        for (what, before, after) in requests(ours, writable) {
            let done = guest.ask("a plain name", what, place, &[&before, b"new\0", &after]);
            guest.refused(&format!("{what:?} in what is read-only"), done);
        }
    }
    for (what, arguments) in [
        (Opcode::Unlink, &b"file\0"[..]),
        (Opcode::Rmdir, b"folder\0"),
        (Opcode::Rename, &[&folder.to_le_bytes()[..], b"file\0new\0"].concat()),
        (Opcode::Rename, &[&writable.to_le_bytes()[..], b"file\0new\0"].concat()),
    ] {
        let done = guest.ask("a plain name", what, folder, &[arguments]);
        guest.refused(&format!("{what:?} of what is read-only"), done);
    }
    let linked = guest.ask("a hard link", Opcode::Link, writable, &[&file.to_le_bytes(), b"linked\0"]);
    guest.refused("a link from what is read-only", linked);
    change_file(guest, file);
}

fn change_file(guest: &mut Guest, file: u64) {
    for flags in [libc::O_WRONLY, libc::O_RDWR, libc::O_RDONLY | libc::O_TRUNC, libc::O_RDWR | libc::O_APPEND] {
        let opened = guest.open(file, flags);
        guest.refused(&format!("opening what is read-only with flags {flags:#o}"), opened);
    }
    let truncated = guest.ask("a plain name", Opcode::Setattr, file, &[&truncation()]);
    guest.refused("truncating what is read-only", truncated);
    let attribute = guest.ask("a plain name", Opcode::Setxattr, file, &[&[1, 0, 0, 0, 0, 0, 0, 0], b"user.x\0x"]);
    guest.refused("an attribute of what is read-only", attribute);
    let Ok(handle) = guest.open(file, libc::O_RDONLY) else {
        return guest.breach("what is read-only cannot be read".to_owned());
    };
    let write = [&handle.to_le_bytes()[..], &[0; 8], &1u32.to_le_bytes(), &[0; 20], b"x"].concat();
    let written: Answer = guest.ask("a handle", Opcode::Write, file, &[&write]);
    guest.refused("writing by a handle for reading", written);
    let allocate = [handle, 0, 4096, 0].map(u64::to_le_bytes).concat();
    let allocated = guest.ask("a handle", Opcode::Fallocate, file, &[&allocate]);
    guest.refused("allocating by a handle for reading", allocated);
}

/// Devices and pipes, the host's and the guest's own: they may be there, and must not be opened.
pub fn use_devices(guest: &mut Guest) {
    let folder = guest.find("writable");
    for (name, kind) in [("zero", libc::S_IFCHR), ("disk", libc::S_IFBLK), ("pipe", libc::S_IFIFO)] {
        let device = libc::makedev(if kind == libc::S_IFBLK { 7 } else { 1 }, 5) as u32;
        let arguments = [kind | 0o666, device, 0, 0].map(u32::to_le_bytes).concat();
        let _ = guest.ask("a device", Opcode::Mknod, folder, &[&arguments, name.as_bytes(), &[0]]);
    }
    for name in ["device", "fifo", "zero", "disk", "pipe"] {
        let Ok(node) = guest.look_up("a device", folder, name) else { continue };
        for flags in [libc::O_RDONLY, libc::O_RDWR, libc::O_RDWR | libc::O_NONBLOCK, libc::O_PATH] {
            let opened = guest.open(node, flags);
            guest.refused(&format!("opening {name} with flags {flags:#o}"), opened);
        }
        let flags = (libc::O_RDWR | libc::O_CREAT | libc::O_NONBLOCK).cast_unsigned();
        let create = [flags, libc::S_IFREG | 0o666, 0, 0].map(u32::to_le_bytes).concat();
        let created = guest.ask("a device", Opcode::Create, folder, &[&create, name.as_bytes(), &[0]]);
        guest.refused(&format!("making {name} once more"), created);
    }
}

/// Nodes and handles that nobody has given out, and operations that there are not.
pub fn forge(guest: &mut Guest) {
    let known = guest.find("writable/file");
    for number in (0..64).chain([known + 1000, 1 << 32, u64::MAX]) {
        guest.read("a node of its own making", number);
        let _ = guest.look_up("a node of its own making", number, "secret");
        guest.read_by("a handle of its own making", known, number);
    }
    let nothing = [0; 256];
    let everything = [0xff; 256];
    for operation in (0..128).chain([4096, u32::MAX]) {
        // The session goes on.
        if ![Opcode::Init, Opcode::Destroy, Opcode::Forget, Opcode::BatchForget, Opcode::Interrupt]
            .map(|what| what as u32)
            .contains(&operation)
        {
            guest.ask_any("any operation", operation, known, &nothing);
            guest.ask_any("any operation", operation, known, &everything);
        }
    }
}

/// What is mounted below an export, and not exported with it.
pub fn see_what_is_mounted(guest: &mut Guest) {
    let below = guest.find(&format!("{BOUND}/{BELOW}"));
    let hidden = guest.look_up("a mount", below, "secret");
    guest.refused("looking below a mount", hidden);
    let folder = guest.find(BOUND);
    for name in [format!("{BELOW}/secret"), format!("{BELOW}/../{BELOW}/secret")] {
        let hidden = guest.look_up("a mount", folder, &name);
        guest.refused("looking below a mount", hidden);
    }
}
