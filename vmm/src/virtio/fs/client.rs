//! The guest's end of FUSE, for tests: as much of a kernel's as it takes to use a tree, one request at a time.

use virtiofsd::filesystem::FsOptions;
pub use virtiofsd::fuse::{Attr, Opcode};
use virtiofsd::fuse::{
    CreateIn, EntryOut, ForgetIn, InHeader, InitInCompat, InitInExt, InitOut, OpenIn, OpenOut, OutHeader, ROOT_ID,
    ReadIn, ReleaseIn, WriteIn, WriteOut,
};
use vm_memory::ByteValued;

use super::super::driver::{Driver, Piece};
use super::super::{Device, DeviceError};
use super::REQUESTS;

/// The tree's root.
pub const ROOT: u64 = ROOT_ID;

/// How long an answer may be whose length nothing says.
const ANSWER: u32 = 8192;

/// An error number.
pub type Errno = i32;

/// What is known of a file.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// Its number in this session.
    pub node: u64,
    /// Its attributes.
    pub attributes: Attr,
}

/// A guest's kernel, and the device that it uses.
pub struct Client<D> {
    /// The device.
    pub device: D,
    /// What drives it.
    pub driver: Driver,
    requests: u64,
}

#[expect(clippy::expect_used, reason = "a test ends where the device breaks its promises")]
impl<D: Device> Client<D> {
    /// Starts the device.
    ///
    /// # Errors
    /// Where it does not start.
    pub fn new(mut device: D) -> Result<Self, DeviceError> {
        let mut driver = Driver::new(&device);
        device.start(&mut driver.io)?;
        Ok(Self { device, driver, requests: 0 })
    }

    /// Begins a session with all that Linux can do: what was agreed on.
    ///
    /// # Errors
    /// The device's.
    pub fn begin(&mut self) -> Result<InitOut, Errno> {
        let can = FsOptions::all().bits();
        let version = InitInCompat { major: 7, minor: 38, max_readahead: 1 << 17, flags: can as u32 };
        let more = InitInExt { flags2: (can >> 32) as u32, ..Default::default() };
        self.request(Opcode::Init, 0, &[version.as_slice(), more.as_slice()]).map(|answer| object(&answer))
    }

    /// Looks a path up from the root, name by name.
    ///
    /// # Errors
    /// The device's.
    pub fn find(&mut self, path: &str) -> Result<Entry, Errno> {
        let mut entry = Entry { node: ROOT, attributes: Attr::default() };
        for name in path.split('/') {
            let answer = self.request(Opcode::Lookup, entry.node, &[name.as_bytes(), &[0]])?;
            entry = found(&answer);
        }
        Ok(entry)
    }

    /// Opens a file: its handle.
    ///
    /// # Errors
    /// The device's.
    pub fn open(&mut self, node: u64, flags: i32) -> Result<u64, Errno> {
        let open = OpenIn { flags: flags.cast_unsigned(), ..Default::default() };
        self.request(Opcode::Open, node, &[open.as_slice()]).map(|answer| object::<OpenOut>(&answer).fh)
    }

    /// Makes a file and opens it for reading and writing: what it is, and its handle.
    ///
    /// # Errors
    /// The device's.
    pub fn create(&mut self, folder: u64, name: &str) -> Result<(Entry, u64), Errno> {
        let flags = (libc::O_RDWR | libc::O_CREAT).cast_unsigned();
        let create = CreateIn { flags, mode: libc::S_IFREG | 0o644, ..Default::default() };
        let answer = self.request(Opcode::Create, folder, &[create.as_slice(), name.as_bytes(), &[0]])?;
        Ok((found(&answer), object::<OpenOut>(&answer[size_of::<EntryOut>()..]).fh))
    }

    /// Reads at most so many bytes.
    ///
    /// # Errors
    /// The device's.
    pub fn read(&mut self, node: u64, handle: u64, offset: u64, size: u32) -> Result<Vec<u8>, Errno> {
        self.read_as(Opcode::Read, node, handle, offset, size)
    }

    /// The names in an open folder, with a node each.
    ///
    /// # Errors
    /// The device's.
    pub fn names(&mut self, node: u64, handle: u64) -> Result<Vec<(String, u64)>, Errno> {
        let mut rest = &self.read_as(Opcode::Readdirplus, node, handle, 0, ANSWER)?[..];
        let mut names = Vec::new();
        while !rest.is_empty() {
            let entry: EntryOut = object(rest);
            let head = size_of::<EntryOut>() + 24;
            let length = u32::from_le_bytes(rest[head - 8..head - 4].try_into().expect("four bytes")) as usize;
            names.push((String::from_utf8_lossy(&rest[head..head + length]).into_owned(), entry.nodeid));
            rest = &rest[(head + length).next_multiple_of(8)..];
        }
        Ok(names)
    }

    fn read_as(&mut self, what: Opcode, node: u64, fh: u64, offset: u64, size: u32) -> Result<Vec<u8>, Errno> {
        let read = ReadIn { fh, offset, size, ..Default::default() };
        let room = size + size_of::<OutHeader>() as u32;
        self.request_for(what as u32, node, &[read.as_slice()], room)
    }

    /// Writes: how much was written.
    ///
    /// # Errors
    /// The device's.
    pub fn write(&mut self, node: u64, handle: u64, offset: u64, bytes: &[u8]) -> Result<u32, Errno> {
        let write = WriteIn { fh: handle, offset, size: bytes.len() as u32, ..Default::default() };
        self.request(Opcode::Write, node, &[write.as_slice(), bytes]).map(|answer| object::<WriteOut>(&answer).size)
    }

    /// Closes a file.
    ///
    /// # Errors
    /// The device's.
    pub fn release(&mut self, node: u64, handle: u64) -> Result<(), Errno> {
        let release = ReleaseIn { fh: handle, ..Default::default() };
        self.request(Opcode::Release, node, &[release.as_slice()]).map(drop)
    }

    /// Forgets that a file was looked up, so often.
    pub fn forget(&mut self, node: u64, lookups: u64) {
        let forget = ForgetIn { nlookup: lookups };
        let request = self.compose(Opcode::Forget as u32, node, &[forget.as_slice()]);
        let answered = self.put(0, &[Piece::Readable(&request)]);
        assert!(answered.is_empty(), "nothing answers a FORGET");
    }

    /// Puts a request as root.
    ///
    /// # Errors
    /// The device's.
    pub fn request(&mut self, what: Opcode, node: u64, arguments: &[&[u8]]) -> Result<Vec<u8>, Errno> {
        self.request_for(what as u32, node, arguments, ANSWER)
    }

    /// Puts a request with that much room for its answer.
    ///
    /// # Errors
    /// The device's.
    pub fn request_for(&mut self, what: u32, node: u64, arguments: &[&[u8]], room: u32) -> Result<Vec<u8>, Errno> {
        let request = self.compose(what, node, arguments);
        // As Linux lays it out: what goes into pages apart from the headers, both ways.
        let (header, body) = request.split_at(size_of::<InHeader>());
        let head = size_of::<OutHeader>() as u32;
        let mut answer = self.put(
            REQUESTS,
            &[Piece::Readable(header), Piece::Readable(body), Piece::Writable(head), Piece::Writable(room - head)],
        );
        assert!(answer.len() >= head as usize, "no answer");
        let said: OutHeader = object(&answer);
        assert_eq!(said.unique, self.requests, "the answer to another request");
        assert_eq!(said.len as usize, answer.len(), "a header that lies about its length");
        if said.error == 0 { Ok(answer.split_off(head as usize)) } else { Err(-said.error) }
    }

    /// A request's bytes.
    pub fn compose(&mut self, what: u32, node: u64, arguments: &[&[u8]]) -> Vec<u8> {
        self.requests += 1;
        let arguments = arguments.concat();
        let length = size_of::<InHeader>() + arguments.len();
        let header =
            InHeader { len: length as u32, opcode: what, unique: self.requests, nodeid: node, ..Default::default() };
        [header.as_slice(), &arguments].concat()
    }

    /// Puts any pieces into a queue: what the device says that it has written.
    pub fn put(&mut self, queue: usize, pieces: &[Piece<'_>]) -> Vec<u8> {
        let request = self.driver.put(queue, pieces);
        if let Some(attendant) = self.device.attendant() {
            attendant.attend(queue).expect("a device that goes on");
        } else {
            self.driver.io.queues[queue].kick();
        }
        if self.driver.io.queues[queue].kick_descriptor().clear() {
            self.device.queue_ready(&mut self.driver.io, queue).expect("a device that goes on");
        }
        let (head, written) = self.driver.used(queue).expect("the request back");
        assert_eq!(head, request.head, "another request back");
        let mut answer = self.driver.written(&request);
        assert!(written as usize <= answer.len(), "more written than there was room for");
        answer.truncate(written as usize);
        answer
    }
}

fn found(answer: &[u8]) -> Entry {
    let entry: EntryOut = object(answer);
    Entry { node: entry.nodeid, attributes: entry.attr }
}

#[expect(clippy::expect_used, reason = "a test ends where an answer is too short")]
pub(super) fn object<T: ByteValued>(bytes: &[u8]) -> T {
    let mut object = T::zeroed();
    object.as_mut_slice().copy_from_slice(bytes.get(..size_of::<T>()).expect("an answer of that length"));
    object
}
