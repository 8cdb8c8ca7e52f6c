//! What a guest is not to believe for a moment: files that only the host changes.
//!
//! A guest keeps names and attributes for a while, since what is in its container's files is mostly its own doing. A volume
//! that it may only read is the host's doing alone: configuration that is replaced while programs look at it, with one
//! rename for all of it. So everything below the share's directory [`FRESH`] is asked for anew whenever it is used.
//!
//! Which files these are is told by their numbers: below [`FRESH`] each has the topmost bit set, which nothing but this
//! knows of. The bit says no more than how long an answer holds, so a guest that makes numbers up gains nothing.

use std::ffi::{CStr, OsStr};
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use nix::libc;
use virtiofsd::filesystem::{
    Context, Entry, Extensions, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SerializableFileSystem, SetattrValid, SetxattrFlags, ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse::{Attr, ROOT_ID, SetattrIn};

/// The directory of the share whose files are fresh.
pub const FRESH: &str = "fresh";

/// Numbers of files count up from one.
const MARK: u64 = 1 << 63;

/// A file system with a directory [`FRESH`].
pub struct Fresh<F>(F);

impl<F: FileSystem<Inode = u64>> Fresh<F> {
    /// Has the answers about what is in the directory hold no longer than it takes to use them.
    pub fn over(inner: F) -> Self {
        Self(inner)
    }
}

fn inner(inode: u64) -> u64 {
    inode & !MARK
}

/// An entry below a directory.
fn entry_in(parent: u64, entry: Entry) -> Entry {
    if parent & MARK == 0 { entry } else { marked(entry) }
}

fn marked(entry: Entry) -> Entry {
    Entry { inode: entry.inode | MARK, attr_timeout: Duration::ZERO, entry_timeout: Duration::ZERO, ..entry }
}

fn attributes_of(inode: u64, (attributes, timeout): (Attr, Duration)) -> (Attr, Duration) {
    (attributes, if inode & MARK == 0 { timeout } else { Duration::ZERO })
}

/// Methods that do what the inner file system does with the same file.
macro_rules! forward {
    ($(fn $name:ident$(<$generic:ident: $bound:ident>)?(
        $context:ident, $inode:ident $(, $argument:ident: $kind:ty)*
    ) -> $result:ty;)*) => {
        $(fn $name$(<$generic: $bound>)?(&self, $context: Context, $inode: u64 $(, $argument: $kind)*) -> $result {
            self.0.$name($context, inner($inode) $(, $argument)*)
        })*
    };
}

impl<F: FileSystem<Inode = u64>> FileSystem for Fresh<F> {
    type DirIter = F::DirIter;
    type Handle = F::Handle;
    type Inode = u64;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        self.0.init(capable)
    }

    fn destroy(&self) {
        self.0.destroy();
    }

    fn lookup(&self, c: Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        let entry = self.0.lookup(c, inner(parent), name)?;
        let is_fresh = parent == ROOT_ID && OsStr::from_bytes(name.to_bytes()) == FRESH;
        Ok(if is_fresh { marked(entry) } else { entry_in(parent, entry) })
    }

    fn batch_forget(&self, c: Context, requests: Vec<(u64, u64)>) {
        self.0.batch_forget(c, requests.into_iter().map(|(inode, count)| (inner(inode), count)).collect());
    }

    fn getattr(&self, c: Context, inode: u64, handle: Option<F::Handle>) -> io::Result<(Attr, Duration)> {
        Ok(attributes_of(inode, self.0.getattr(c, inner(inode), handle)?))
    }

    fn setattr(
        &self,
        c: Context,
        inode: u64,
        attr: SetattrIn,
        handle: Option<F::Handle>,
        valid: SetattrValid,
    ) -> io::Result<(Attr, Duration)> {
        Ok(attributes_of(inode, self.0.setattr(c, inner(inode), attr, handle, valid)?))
    }

    fn symlink(&self, c: Context, link: &CStr, parent: u64, name: &CStr, x: Extensions) -> io::Result<Entry> {
        Ok(entry_in(parent, self.0.symlink(c, link, inner(parent), name, x)?))
    }

    fn mknod(
        &self,
        c: Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        rdev: u32,
        umask: u32,
        x: Extensions,
    ) -> io::Result<Entry> {
        Ok(entry_in(parent, self.0.mknod(c, inner(parent), name, mode, rdev, umask, x)?))
    }

    fn mkdir(&self, c: Context, parent: u64, name: &CStr, mode: u32, umask: u32, x: Extensions) -> io::Result<Entry> {
        Ok(entry_in(parent, self.0.mkdir(c, inner(parent), name, mode, umask, x)?))
    }

    fn rename(&self, c: Context, from: u64, old: &CStr, to: u64, new: &CStr, flags: u32) -> io::Result<()> {
        self.0.rename(c, inner(from), old, inner(to), new, flags)
    }

    fn link(&self, c: Context, inode: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        Ok(entry_in(parent, self.0.link(c, inner(inode), inner(parent), name)?))
    }

    fn create(
        &self,
        c: Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        kill: bool,
        flags: u32,
        umask: u32,
        x: Extensions,
    ) -> io::Result<(Entry, Option<F::Handle>, OpenOptions)> {
        let (entry, handle, options) = self.0.create(c, inner(parent), name, mode, kill, flags, umask, x)?;
        Ok((entry_in(parent, entry), handle, options))
    }

    fn copyfilerange(
        &self,
        c: Context,
        inode: u64,
        handle: F::Handle,
        offset: u64,
        to_inode: u64,
        to_handle: F::Handle,
        to_offset: u64,
        length: u64,
        flags: u64,
    ) -> io::Result<usize> {
        self.0.copyfilerange(c, inner(inode), handle, offset, inner(to_inode), to_handle, to_offset, length, flags)
    }

    forward! {
        fn forget(c, inode, count: u64) -> ();
        fn readlink(c, inode) -> io::Result<Vec<u8>>;
        fn unlink(c, parent, name: &CStr) -> io::Result<()>;
        fn rmdir(c, parent, name: &CStr) -> io::Result<()>;
        fn open(c, inode, kill: bool, flags: u32) -> io::Result<(Option<F::Handle>, OpenOptions)>;
        fn read<W: ZeroCopyWriter>(
            c, inode, handle: F::Handle, writer: W, size: u32, offset: u64, owner: Option<u64>, flags: u32
        ) -> io::Result<usize>;
        fn write<R: ZeroCopyReader>(
            c, inode, handle: F::Handle, reader: R, size: u32, offset: u64, owner: Option<u64>, delayed: bool,
            kill: bool, flags: u32
        ) -> io::Result<usize>;
        fn flush(c, inode, handle: F::Handle, owner: u64) -> io::Result<()>;
        fn fsync(c, inode, data: bool, handle: F::Handle) -> io::Result<()>;
        fn fallocate(c, inode, handle: F::Handle, mode: u32, offset: u64, length: u64) -> io::Result<()>;
        fn release(
            c, inode, flags: u32, handle: F::Handle, flush: bool, flock: bool, owner: Option<u64>
        ) -> io::Result<()>;
        fn statfs(c, inode) -> io::Result<libc::statvfs64>;
        fn setxattr(c, inode, name: &CStr, value: &[u8], flags: u32, extra: SetxattrFlags) -> io::Result<()>;
        fn getxattr(c, inode, name: &CStr, size: u32) -> io::Result<GetxattrReply>;
        fn listxattr(c, inode, size: u32) -> io::Result<ListxattrReply>;
        fn removexattr(c, inode, name: &CStr) -> io::Result<()>;
        fn opendir(c, inode, flags: u32) -> io::Result<(Option<F::Handle>, OpenOptions)>;
        fn readdir(c, inode, handle: F::Handle, size: u32, offset: u64) -> io::Result<F::DirIter>;
        fn fsyncdir(c, inode, data: bool, handle: F::Handle) -> io::Result<()>;
        fn releasedir(c, inode, flags: u32, handle: F::Handle) -> io::Result<()>;
        fn access(c, inode, mask: u32) -> io::Result<()>;
        fn lseek(c, inode, handle: F::Handle, offset: u64, whence: u32) -> io::Result<u64>;
        fn syncfs(c, inode) -> io::Result<()>;
    }
}

impl<F: SerializableFileSystem> SerializableFileSystem for Fresh<F> {
    fn prepare_serialization(&self, cancel: Arc<AtomicBool>) {
        self.0.prepare_serialization(cancel);
    }

    fn serialize(&self, state: File) -> io::Result<()> {
        self.0.serialize(state)
    }

    fn deserialize_and_apply(&self, state: File) -> io::Result<()> {
        self.0.deserialize_and_apply(state)
    }
}
