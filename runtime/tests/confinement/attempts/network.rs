//! Sockets, to anybody.

use std::io;
use std::net::{TcpStream, UdpSocket};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

use nix::libc;

use super::{Attempt, attempt, sometimes};
use crate::system::{argument, call};

pub const ATTEMPTS: &[Attempt] = &[
    attempt("connect by TCP", |map| TcpStream::connect(map.tcp).map(drop)),
    attempt("send by UDP", |map| UdpSocket::bind("127.0.0.1:0")?.send_to(b"x", map.tcp).map(drop)),
    attempt("connect to an abstract socket", |map| {
        UnixStream::connect_addr(&SocketAddr::from_abstract_name(&map.name)?).map(drop)
    }),
    attempt("connect to a socket", |map| UnixStream::connect(map.outside.join("socket")).map(drop)),
    attempt("connect to a socket in an export", |map| UnixStream::connect(map.writable.join("socket")).map(drop)),
    attempt("listen in an export", |map| {
        UnixListener::bind(map.writable.join(format!("socket-{}", std::process::id()))).map(drop)
    }),
    attempt("see all frames of a network", |_| socket(libc::AF_PACKET, libc::SOCK_RAW)),
    attempt("talk to the kernel by netlink", |_| socket(libc::AF_NETLINK, libc::SOCK_RAW)),
    sometimes("talk to other machines by vsock", |_| socket(libc::AF_VSOCK, libc::SOCK_STREAM)),
];

fn socket(family: libc::c_int, kind: libc::c_int) -> io::Result<()> {
    call(libc::SYS_socket, [argument(family), argument(kind), 0]).map(drop)
}
