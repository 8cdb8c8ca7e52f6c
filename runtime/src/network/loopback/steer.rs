//! A program for the host's kernel that steers connections to a socket: see "BPF sk_lookup program" in the kernel's
//! documentation. It is asked for each connection that comes into the network namespace, before the sockets that listen.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

use nix::libc;

/// Has the kernel give the listening `socket` all TCP connections to the loopback addresses of the calling thread's network
/// namespace, for as long as the answer is open.
///
/// # Errors
/// Those of bpf(2).
pub(super) fn to(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let map = create_map()?;
    put(map.as_fd(), socket)?;
    let program = load(&instructions(map.as_fd()))?;
    let namespace = File::open("/proc/thread-self/ns/net")?;
    attach(program.as_fd(), namespace.as_fd())
}

// The commands, types and attributes of <linux/bpf.h>.
const MAP_CREATE: libc::c_int = 0;
const MAP_UPDATE_ELEM: libc::c_int = 2;
const PROG_LOAD: libc::c_int = 5;
const LINK_CREATE: libc::c_int = 28;
const MAP_TYPE_SOCKMAP: u32 = 15;
const PROG_TYPE_SK_LOOKUP: u32 = 30;
const SK_LOOKUP: u32 = 36;
const MAP_LOOKUP_ELEM: i32 = 1;
const SK_RELEASE: i32 = 86;
const SK_ASSIGN: i32 = 124;
/// What a program says of a connection that it has nothing against.
const SK_PASS: i32 = 1;

#[repr(C)]
struct MapAttributes {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}

fn create_map() -> io::Result<OwnedFd> {
    let attributes = MapAttributes { map_type: MAP_TYPE_SOCKMAP, key_size: 4, value_size: 8, max_entries: 1 };
    // SAFETY: the attributes are those of the command, and point at nothing.
    unsafe { make(MAP_CREATE, &attributes) }
}

#[repr(C)]
struct ElementAttributes {
    map: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

fn put(map: BorrowedFd<'_>, socket: BorrowedFd<'_>) -> io::Result<()> {
    let key = 0u32;
    let value = u64::from(number(socket));
    let attributes = ElementAttributes {
        map: number(map),
        padding: 0,
        key: &raw const key as u64,
        value: &raw const value as u64,
        flags: 0,
    };
    // SAFETY: the attributes are those of the command; key and value are of the map's sizes and outlive the call.
    unsafe { call(MAP_UPDATE_ELEM, &attributes) }.map(drop)
}

#[repr(C)]
struct ProgramAttributes {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    expected_attach_type: u32,
}

fn load(instructions: &[Instruction]) -> io::Result<OwnedFd> {
    let attributes = ProgramAttributes {
        program_type: PROG_TYPE_SK_LOOKUP,
        instruction_count: u32::try_from(instructions.len()).map_err(io::Error::other)?,
        instructions: instructions.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
        name: *b"runvm_loopback\0\0",
        interface: 0,
        expected_attach_type: SK_LOOKUP,
    };
    // SAFETY: the attributes are those of the command; the instructions and the license outlive the call.
    unsafe { make(PROG_LOAD, &attributes) }
}

#[repr(C)]
struct LinkAttributes {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
}

fn attach(program: BorrowedFd<'_>, namespace: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let attributes =
        LinkAttributes { program: number(program), target: number(namespace), attach_type: SK_LOOKUP, flags: 0 };
    // SAFETY: the attributes are those of the command, and point at nothing.
    unsafe { make(LINK_CREATE, &attributes) }
}

fn number(descriptor: BorrowedFd<'_>) -> u32 {
    descriptor.as_raw_fd().cast_unsigned()
}

/// Calls bpf(2) for a descriptor.
///
/// # Safety
/// As [`call`]; the command is one that answers with a descriptor.
unsafe fn make<T>(command: libc::c_int, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: the caller's word.
    let descriptor = unsafe { call(command, attributes) }?;
    // SAFETY: the command has just made it, with close-on-exec, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Calls bpf(2).
///
/// # Safety
/// The attributes have to be those of the command, and what they point at has to be valid.
unsafe fn call<T>(command: libc::c_int, attributes: &T) -> io::Result<libc::c_int> {
    // SAFETY: the kernel reads as many bytes as are said; the rest is the caller's word.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { libc::c_int::try_from(result).map_err(io::Error::other) }
}

/// An instruction of the kernel's virtual machine: see "BPF Instruction Set" in its documentation.
#[repr(C)]
#[derive(Clone, Copy)]
struct Instruction {
    code: u8,
    /// Destination in the lower half, source in the upper one.
    registers: u8,
    offset: i16,
    immediate: i32,
}

impl Instruction {
    fn new(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> Self {
        Self { code, registers: destination | source << 4, offset, immediate }
    }

    /// `destination = immediate`
    fn set(destination: u8, immediate: i32) -> Self {
        Self::new(0xb7, destination, 0, 0, immediate)
    }

    /// `destination = source`
    fn copy(destination: u8, source: u8) -> Self {
        Self::new(0xbf, destination, source, 0, 0)
    }

    /// `destination = *(u32 *)(source + offset)`
    fn read(destination: u8, source: u8, offset: i16) -> Self {
        Self::new(0x61, destination, source, offset, 0)
    }

    fn call(function: i32) -> Self {
        Self::new(0x85, 0, 0, 0, function)
    }
}

// Registers: the answer, the arguments, two that calls leave alone, and the end of the stack.
const R0: u8 = 0;
const R1: u8 = 1;
const R2: u8 = 2;
const R3: u8 = 3;
const R6: u8 = 6;
const R7: u8 = 7;
const STACK: u8 = 10;

/// Where the questions of the kernel have what of a connection: `struct bpf_sk_lookup`.
const FAMILY: i16 = 8;
const PROTOCOL: i16 = 12;
const LOCAL_IP4: i16 = 40;
const LOCAL_IP6: [i16; 4] = [44, 48, 52, 56];

fn instructions(map: BorrowedFd<'_>) -> Vec<Instruction> {
    use Instruction as I;
    // In the order of the network, as the kernel has addresses.
    let ip4 = u32::from_be_bytes([127, 0, 0, 1]).to_be().cast_signed();
    let ip6_end = 1u32.to_be().cast_signed();
    // Jumps are written once the length of what they leap over is known.
    let unless = |register, value, over: usize| I::new(0x56, register, 0, over as i16, value);

    let give = [
        // The key, on the stack.
        I::new(0x62, STACK, 0, -4, 0),
        I::copy(R2, STACK),
        I::new(0x07, R2, 0, 0, -4),
        I::new(0x18, R1, 1, 0, map.as_raw_fd()),
        I::new(0, 0, 0, 0, 0),
        I::call(MAP_LOOKUP_ELEM),
        // No socket, as it is being closed: over the seven that follow.
        I::new(0x15, R0, 0, 7, 0),
        I::copy(R7, R0),
        I::copy(R1, R6),
        I::copy(R2, R7),
        I::set(R3, 0),
        I::call(SK_ASSIGN),
        I::copy(R1, R7),
        I::call(SK_RELEASE),
    ];
    let end = [I::set(R0, SK_PASS), I::new(0x95, 0, 0, 0, 0)];

    let mut version_6: Vec<I> = Vec::new();
    for (index, offset) in LOCAL_IP6.into_iter().enumerate() {
        let left = 2 * (LOCAL_IP6.len() - 1 - index);
        let value = if index + 1 == LOCAL_IP6.len() { ip6_end } else { 0 };
        // Over what is left of this, and the leap, the other version, and the giving.
        version_6.extend([I::read(R2, R6, offset), unless(R2, value, left + 1 + 2 + give.len())]);
    }
    version_6.push(I::new(0x05, 0, 0, 2, 0));
    let version_4 = [I::read(R2, R6, LOCAL_IP4), unless(R2, ip4, give.len())];

    let mut all = vec![I::copy(R6, R1), I::read(R2, R6, PROTOCOL)];
    all.push(unless(R2, libc::IPPROTO_TCP, 3 + version_6.len() + version_4.len() + give.len()));
    all.push(I::read(R2, R6, FAMILY));
    // Version 4 is behind version 6.
    all.push(I::new(0x16, R2, 0, version_6.len() as i16 + 1, libc::AF_INET));
    all.push(unless(R2, libc::AF_INET6, version_6.len() + version_4.len() + give.len()));
    all.extend(version_6);
    all.extend(version_4);
    all.extend(give);
    all.extend(end);
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv4Addr, TcpListener, TcpStream};
    use std::thread;

    /// In a network namespace of its own, whose loopback is up. It needs root.
    fn apart(test: impl FnOnce() + Send + 'static) {
        let thread = thread::spawn(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(crate::network::namespace::create()).unwrap();
            test();
        });
        thread.join().unwrap();
    }

    #[test]
    fn any_port_of_the_loopback_leads_to_the_socket() {
        apart(|| {
            let listener = TcpListener::bind("[::]:0").unwrap();
            let steering = to(listener.as_fd()).unwrap();
            for address in ["127.0.0.1:80", "[::1]:8080"] {
                let _client = TcpStream::connect(address).unwrap();
                let (connection, _) = listener.accept().unwrap();
                let port = connection.local_addr().unwrap().port();
                assert_eq!(port, address.rsplit(':').next().unwrap().parse::<u16>().unwrap());
            }
            // Other addresses of the loopback are somebody else's: an engine's resolver listens at one.
            assert!(TcpStream::connect((Ipv4Addr::new(127, 0, 0, 11), 53)).is_err());
            drop(steering);
            assert!(TcpStream::connect("127.0.0.1:80").is_err());
        });
    }
}
