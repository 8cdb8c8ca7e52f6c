//! As much of a VMM and of a guest's kernel as it takes to put requests to the daemon, well-formed or not: one queue, one
//! request at a time.

use std::fs::File;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;

use nix::libc;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::MemfdFlags;
use vhost::vhost_user::{Frontend, VhostUserFrontend as _, VhostUserProtocolFeatures};
use vhost::{VhostBackend as _, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

/// The share's root.
pub(super) const ROOT: u64 = 1;

pub(super) const LOOKUP: u32 = 1;
pub(super) const READLINK: u32 = 5;
pub(super) const UNLINK: u32 = 10;
pub(super) const OPEN: u32 = 14;
pub(super) const READ: u32 = 15;
pub(super) const SETXATTR: u32 = 21;
pub(super) const INIT: u32 = 26;
pub(super) const CREATE: u32 = 35;

const MEMORY: u64 = 1 << 20;
const DESCRIPTORS: u64 = 0;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const REQUEST: u64 = 0x1_0000;
const ANSWER: u64 = 0x4_0000;
const ANSWER_SIZE: u32 = 0x4_0000;
const QUEUE_SIZE: u16 = 16;
/// The first one is for FUSE's urgent messages.
const REQUEST_QUEUE: usize = 1;
const NEXT: u16 = 1;
const WRITABLE: u16 = 2;

/// `VIRTIO_F_VERSION_1` and the protocol's own features.
const FEATURES: u64 = 1 << 32 | 1 << 30;

/// Nothing waits so long in a test that passes.
const PATIENCE: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// A guest that has the share mounted.
pub(super) struct Guest {
    memory: File,
    _frontend: Frontend,
    kick: EventFd,
    call: EventFd,
    requests: u16,
}

/// What FUSE says of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) node: u64,
    pub(super) inode: u64,
    pub(super) mode: u32,
    /// For how many seconds its name may be believed, and for how many its attributes.
    pub(super) trust: [u64; 2],
}

/// An error number.
pub(super) type Errno = i32;

impl Guest {
    pub(super) fn new(socket: OwnedFd) -> Self {
        let memory = File::from(rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        memory.set_len(MEMORY).unwrap();
        let mut frontend = Frontend::from_stream(UnixStream::from(socket), 2);
        frontend.set_owner().unwrap();
        frontend.get_features().unwrap();
        frontend.set_features(FEATURES).unwrap();
        frontend.get_protocol_features().unwrap();
        frontend.set_protocol_features(VhostUserProtocolFeatures::MQ).unwrap();
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: MEMORY,
            // Nobody maps the memory here, so the addresses of "user space" are the guest's.
            userspace_addr: 0,
            mmap_offset: 0,
            mmap_handle: memory.as_raw_fd(),
        };
        frontend.set_mem_table(&[region]).unwrap();
        let (kick, call) = (EventFd::new(0).unwrap(), EventFd::new(0).unwrap());
        let layout = VringConfigData {
            queue_max_size: QUEUE_SIZE,
            queue_size: QUEUE_SIZE,
            flags: 0,
            desc_table_addr: DESCRIPTORS,
            used_ring_addr: USED,
            avail_ring_addr: AVAILABLE,
            log_addr: None,
        };
        frontend.set_vring_num(REQUEST_QUEUE, QUEUE_SIZE).unwrap();
        frontend.set_vring_addr(REQUEST_QUEUE, &layout).unwrap();
        frontend.set_vring_base(REQUEST_QUEUE, 0).unwrap();
        frontend.set_vring_call(REQUEST_QUEUE, &call).unwrap();
        frontend.set_vring_kick(REQUEST_QUEUE, &kick).unwrap();
        frontend.set_vring_enable(REQUEST_QUEUE, true).unwrap();
        let mut guest = Self { memory, _frontend: frontend, kick, call, requests: 0 };
        // FUSE 7.38, no read-ahead, submounts; 64 bytes in all.
        let mut version = [7u32, 38, 0, 1 << 27].map(u32::to_le_bytes).concat();
        version.resize(64, 0);
        guest.request(INIT, 0, &version).unwrap();
        guest
    }

    /// Puts a request as root.
    pub(super) fn request(&mut self, operation: u32, node: u64, arguments: &[u8]) -> Result<Vec<u8>, Errno> {
        let length = u32::try_from(arguments.len() + 40).unwrap();
        let mut request = [length, operation].map(u32::to_le_bytes).concat();
        // Number, node; then user, group, process and extensions: all zero.
        request.extend([u64::from(self.requests), node].map(u64::to_le_bytes).concat());
        request.extend([0; 16]);
        request.extend(arguments);
        self.send(&request, REQUEST);
        // SAFETY: the event's descriptor is open as long as `self` is there.
        let call = unsafe { BorrowedFd::borrow_raw(self.call.as_raw_fd()) };
        let mut called = [PollFd::from_borrowed_fd(call, PollFlags::IN)];
        assert_eq!(rustix::event::poll(&mut called, Some(&PATIENCE)), Ok(1), "an answer");
        self.call.read().unwrap();
        let head = self.read(ANSWER, 16);
        let length = u32::from_le_bytes(head[..4].try_into().unwrap());
        let error = i32::from_le_bytes(head[4..8].try_into().unwrap());
        if error == 0 { Ok(self.read(ANSWER + 16, length as usize - 16)) } else { Err(-error) }
    }

    /// Sends bytes from an address, which need not be the guest's.
    pub(super) fn send(&mut self, request: &[u8], address: u64) {
        if address < MEMORY {
            self.write(address, request);
        }
        self.describe(0, address, request.len() as u32, NEXT, 1);
        self.describe(1, ANSWER, ANSWER_SIZE, WRITABLE, 0);
        self.write(ANSWER, &[0; 16]);
        let slot = u64::from(self.requests % QUEUE_SIZE);
        self.write(AVAILABLE + 4 + 2 * slot, &0u16.to_le_bytes());
        self.requests = self.requests.wrapping_add(1);
        self.write(AVAILABLE + 2, &self.requests.to_le_bytes());
        self.kick.write(1).unwrap();
    }

    /// Looks a path up, name by name.
    pub(super) fn find(&mut self, path: &str) -> Result<Entry, Errno> {
        let mut entry = Entry { node: ROOT, inode: 0, mode: 0, trust: [0, 0] };
        for name in path.split('/') {
            entry = self.look_up(entry.node, name)?;
        }
        Ok(entry)
    }

    /// Looks one name up, whatever is in it.
    pub(super) fn look_up(&mut self, directory: u64, name: &str) -> Result<Entry, Errno> {
        let answer = self.request(LOOKUP, directory, &c_string(name))?;
        let number = |at: usize| u64::from_le_bytes(answer[at..at + 8].try_into().unwrap());
        let mode = u32::from_le_bytes(answer[100..104].try_into().unwrap());
        Ok(Entry { node: number(0), inode: number(40), mode, trust: [number(16), number(24)] })
    }

    /// A file's content.
    pub(super) fn cat(&mut self, path: &str) -> Result<String, Errno> {
        let node = self.find(path)?.node;
        let handle = self.open(node, libc::O_RDONLY)?;
        let mut arguments = [handle, 0].map(u64::to_le_bytes).concat();
        arguments.extend(4096u64.to_le_bytes());
        arguments.extend([0; 16]);
        Ok(String::from_utf8(self.request(READ, node, &arguments)?).unwrap())
    }

    pub(super) fn open(&mut self, node: u64, flags: i32) -> Result<u64, Errno> {
        let arguments = [flags.cast_unsigned(), 0].map(u32::to_le_bytes).concat();
        let answer = self.request(OPEN, node, &arguments)?;
        Ok(u64::from_le_bytes(answer[..8].try_into().unwrap()))
    }

    pub(super) fn create(&mut self, directory: u64, name: &str) -> Result<(), Errno> {
        let flags = (libc::O_RDWR | libc::O_CREAT).cast_unsigned();
        let mut arguments = [flags, 0o644, 0, 0].map(u32::to_le_bytes).concat();
        arguments.extend(c_string(name));
        self.request(CREATE, directory, &arguments).map(drop)
    }

    fn describe(&self, slot: u64, address: u64, length: u32, flags: u16, next: u16) {
        let rest = [flags.to_le_bytes(), next.to_le_bytes()].concat();
        let descriptor = [&address.to_le_bytes()[..], &length.to_le_bytes(), &rest].concat();
        self.write(DESCRIPTORS + 16 * slot, &descriptor);
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        self.memory.write_all_at(bytes, address).unwrap();
    }

    fn read(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_exact_at(&mut bytes, address).unwrap();
        bytes
    }
}

pub(super) fn c_string(name: &str) -> Vec<u8> {
    [name.as_bytes(), &[0]].concat()
}
