//! A session of FUSE in bytes: the files that the guest knows and has open.
//!
//! virtiofsd names them by their paths below the root and finds them there again, in whichever process takes over; the
//! tree has to be there at the same paths. What the server itself remembers of a session, the options that the two sides
//! agreed on, is not in its state: so the session is begun anew, as the guest began it, before its files are put back.
//!
//! The state is as untrusted as the guest: it leads to files that the guest could have asked for by name, in a process
//! that sees no others.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rustix::fs::{MemfdFlags, memfd_create};
use serde::{Deserialize, Serialize};
use virtiofsd::filesystem::{FileSystem, FsOptions, SerializableFileSystem};
use virtiofsd::fuse::{InHeader, InitInCompat, InitInExt, KERNEL_MINOR_VERSION, KERNEL_VERSION, Opcode, OutHeader};
use virtiofsd::server::Server;
use vm_memory::ByteValued as _;

use super::super::DeviceError;
use super::guard::Guard;
use super::letter::Letter;

/// The largest state, in bytes: some hundreds of thousands of files.
pub(super) const MAX_STATE: u64 = 64 << 20;

const DAMAGED: DeviceError = DeviceError::State("it is no session of a file system");

#[derive(Deserialize, Serialize)]
struct State<'a> {
    /// What the guest's kernel said it can do: `FsOptions`.
    capable: u64,
    /// In virtiofsd's own format.
    files: &'a [u8],
}

/// The session's state. The session goes on.
pub(super) fn save<F>(server: &Server<Guard<F>>, capable: FsOptions) -> Result<Vec<u8>, DeviceError>
where
    F: FileSystem + SerializableFileSystem + Send + Sync,
{
    server.prepare_serialization(Arc::new(AtomicBool::new(false)));
    let files = files_of(server).map_err(DeviceError::host("save the files that the guest has open"))?;
    let state = State { capable: capable.bits(), files: &files };
    postcard::to_stdvec(&state)
        .map_err(|error| DeviceError::host("save a file system's session")(io::Error::other(error)))
}

fn files_of<F>(server: &Server<Guard<F>>) -> io::Result<Vec<u8>>
where
    F: FileSystem + SerializableFileSystem + Send + Sync,
{
    let mut file = scratch()?;
    server.serialize(file.try_clone()?)?;
    if file.metadata()?.len() > MAX_STATE {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, "they are too many"));
    }
    let mut files = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut files)?;
    Ok(files)
}

/// Takes over a session. Where this fails, there is a part of it.
pub(super) fn restore<F>(server: &Server<Guard<F>>, saved: &[u8]) -> Result<(), DeviceError>
where
    F: FileSystem + SerializableFileSystem + Send + Sync,
{
    if saved.len() as u64 > MAX_STATE + 64 {
        return Err(DAMAGED);
    }
    let state: State<'_> = postcard::from_bytes(saved).map_err(|_| DAMAGED)?;
    begin(server, FsOptions::from_bits_truncate(state.capable))?;
    put_back(server, state.files).map_err(DeviceError::host("find the files again that the guest has open"))
}

fn put_back(server: &impl SerializableFileSystem, files: &[u8]) -> io::Result<()> {
    let mut file = scratch()?;
    file.write_all(files)?;
    file.rewind()?;
    server.deserialize_and_apply(file)
}

/// Begins a session in the guest's place.
fn begin<F: FileSystem + Send + Sync>(server: &Server<Guard<F>>, capable: FsOptions) -> Result<(), DeviceError> {
    let bits = capable.bits();
    let version =
        InitInCompat { major: KERNEL_VERSION, minor: KERNEL_MINOR_VERSION, max_readahead: 0, flags: bits as u32 };
    let more = InitInExt { flags2: (bits >> 32) as u32, ..Default::default() };
    let length = size_of::<InHeader>() + version.as_slice().len() + more.as_slice().len();
    let header = InHeader { len: length as u32, opcode: Opcode::Init as u32, ..Default::default() };
    let letter = Letter::new(&[header.as_slice(), version.as_slice(), more.as_slice()].concat())?;

    let begun = letter.reader().and_then(|reader| Ok((reader, letter.writer()?))).and_then(|(reader, writer)| {
        server.handle_message(reader, writer, None::<&mut ()>).map_err(io::Error::other)?;
        match letter.answer::<OutHeader>()?.error {
            0 => Ok(()),
            error => Err(io::Error::from_raw_os_error(-error)),
        }
    });
    begun.map_err(DeviceError::host("begin a file system's session again"))
}

fn scratch() -> io::Result<File> {
    Ok(memfd_create("file system", MemfdFlags::CLOEXEC)?.into())
}
