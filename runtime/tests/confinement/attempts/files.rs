//! Files and mounts of the host's.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};

use nix::libc;

use super::{Attempt, attempt, in_vain, sometimes};
use crate::ground::{Map, SECRET};
use crate::system::{argument, c_path, call};

/// How far up a way out goes, at least as far as any folder is deep.
const UP: &str = "../../../../../../../../../../../..";
/// As many descriptors as the process may have.
const DESCRIPTORS: i32 = 64;

pub const ATTEMPTS: &[Attempt] = &[
    attempt("read a file by its name", |map| read(&map.outside.join("secret"))),
    attempt("read a file through ..", |map| read(&climb(&map.writable, &map.outside.join("secret")))),
    attempt("read a file through an absolute link in an export", |map| read(&map.writable.join("absolute"))),
    attempt("read a file through a relative link in an export", |map| read(&map.writable.join("relative"))),
    attempt("read a file from any descriptor on", |map| {
        from_any_descriptor(&map.writable, &climb(Path::new(""), &map.outside.join("secret")), libc::O_RDONLY)
    }),
    attempt("get from the process's descriptors to the rest of /proc", |_| {
        from_any_descriptor(Path::new("/proc/self/fd"), Path::new("../environ"), libc::O_RDONLY)
    }),
    attempt("read a file through the root of another process", |map| {
        read(&climb(Path::new(&format!("/proc/{}/root", map.owner)), &map.outside.join("secret")))
    }),
    sometimes("open a file by its handle", by_handle),
    attempt("change a file", |map| OpenOptions::new().write(true).open(map.outside.join("secret")).map(drop)),
    attempt("make a file", |map| File::create(map.outside.join("new")).map(drop)),
    attempt("remove a file", |map| {
        let path = c_path(&map.outside.join("doomed"));
        call(libc::SYS_unlinkat, [argument(libc::AT_FDCWD), path.as_ptr() as usize, 0]).map(drop)
    }),
    attempt("move a file of an export out of it", |map| two_names(libc::SYS_renameat2, map, "moved")),
    attempt("link a file of an export outside", |map| two_names(libc::SYS_linkat, map, "linked")),
    attempt("make a file in a read-only export", |map| File::create(map.read_only.join("new")).map(drop)),
    attempt("use a device of its own making", device),
    attempt("open the program's own file", |_| File::open("/proc/self/exe").map(drop)),
    sometimes("open /dev/kvm", |_| File::open("/dev/kvm").map(drop)),
    sometimes("open /dev/net/tun", |_| File::open("/dev/net/tun").map(drop)),
    sometimes("open /dev/mem", |_| File::open("/dev/mem").map(drop)),
    sometimes("open the kernel's log", |_| File::open("/dev/kmsg").map(drop)),
    sometimes("set what is run for core dumps", |_| {
        OpenOptions::new().write(true).open("/proc/sys/kernel/core_pattern").map(drop)
    }),
    attempt("mount a file system", |map| mount(None, &map.writable, "tmpfs", 0)),
    attempt("bind a folder into an export", |map| mount(Some(&map.outside), &map.writable, "", libc::MS_BIND)),
    attempt("make a file system", |_| call(libc::SYS_fsopen, [c"tmpfs".as_ptr() as usize, 0]).map(drop)),
    attempt("copy a mount", |map| {
        let (path, flags) = (c_path(&map.writable), libc::OPEN_TREE_CLONE as usize);
        call(libc::SYS_open_tree, [argument(libc::AT_FDCWD), path.as_ptr() as usize, flags]).map(drop)
    }),
    attempt("change the root", |map| {
        let path = c_path(&map.writable);
        call(libc::SYS_chroot, [path.as_ptr() as usize]).map(drop)
    }),
];

/// The way from a folder up and down again.
fn climb(from: &Path, to: &Path) -> PathBuf {
    from.join(UP).join(to.strip_prefix("/").unwrap_or(to))
}

fn read(path: &Path) -> io::Result<()> {
    if fs::read(path)? == SECRET.to_ne_bytes() { Ok(()) } else { Err(in_vain()) }
}

/// Opens a file from any descriptor that the process has, and from one of this folder if it can have one.
fn from_any_descriptor(folder: &Path, way: &Path, flags: libc::c_int) -> io::Result<()> {
    let _folder = File::open(folder);
    let way = c_path(way);
    let open = |folder| call(libc::SYS_openat, [argument(folder), way.as_ptr() as usize, argument(flags)]);
    (0..DESCRIPTORS).find_map(|folder| open(folder).ok()).map(drop).ok_or_else(in_vain)
}

/// Makes a file in an export, and gives it a name outside.
fn two_names(number: libc::c_long, map: &Map, name: &str) -> io::Result<()> {
    let ours = map.writable.join(format!("{name}-{}", std::process::id()));
    File::create(&ours)?;
    let (ours, theirs) = (c_path(&ours), c_path(&map.outside.join(name)));
    let here = argument(libc::AT_FDCWD);
    call(number, [here, ours.as_ptr() as usize, here, theirs.as_ptr() as usize, 0]).map(drop)
}

fn by_handle(map: &Map) -> io::Result<()> {
    let handle = map.handle.as_ref().ok_or_else(in_vain)?;
    let mount = File::open(&map.writable)?;
    let arguments = [argument(mount.as_raw_fd()), handle.as_ptr() as usize, libc::O_RDONLY as usize];
    call(libc::SYS_open_by_handle_at, arguments).map(drop)
}

fn device(map: &Map) -> io::Result<()> {
    let path = map.writable.join(format!("device-{}", std::process::id()));
    let name = c_path(&path);
    let zero = libc::makedev(1, 5);
    let mode = (libc::S_IFCHR | 0o600) as usize;
    call(libc::SYS_mknodat, [argument(libc::AT_FDCWD), name.as_ptr() as usize, mode, zero as usize])?;
    File::open(&path).map(drop)
}

fn mount(source: Option<&Path>, target: &Path, kind: &str, flags: libc::c_ulong) -> io::Result<()> {
    let (source, target) = (c_path(source.unwrap_or(Path::new("none"))), c_path(target));
    let kind = c_path(Path::new(kind));
    let arguments = [source.as_ptr() as usize, target.as_ptr() as usize, kind.as_ptr() as usize, flags as usize, 0];
    call(libc::SYS_mount, arguments).map(drop)
}
