//! The virtio-serial port that carries the channel.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use runvm_protocol::SERIAL_PORT_NAME;
use rustix::event::epoll;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, netlink};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

use crate::readiness;

/// The group of the kernel's own device events.
const KERNEL_EVENTS: u32 = 1;

/// QEMU under TCG looks at what the host has sent before the port was open only when its main loop turns for another
/// reason. A timer of the guest's, however short, is one.
const NUDGE: Duration = Duration::from_millis(1);

/// The port as a byte stream. Reads end when the host's side closes.
pub(crate) struct Serial {
    port: OwnedFd,
    /// The port is behind an epoll of its own: a port whose host side is not there yet reports a hang-up, which
    /// tokio would take for final.
    events: AsyncFd<OwnedFd>,
    readable: bool,
    writable: bool,
    connected: bool,
}

impl Serial {
    /// Opens the port, once the kernel has found it, and waits for the host's side.
    pub(crate) async fn open() -> io::Result<Self> {
        let path = find().await?;
        let port = rustix::fs::open(path, OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?;
        let mut serial = Self::over(port)?;
        std::future::poll_fn(|cx| {
            while !serial.connected {
                ready!(serial.poll_events(cx))?;
            }
            Poll::Ready(Ok::<_, io::Error>(()))
        })
        .await?;
        tokio::spawn(tokio::time::sleep(NUDGE));
        Ok(serial)
    }

    fn over(port: OwnedFd) -> io::Result<Self> {
        let events = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let interest = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        epoll::add(&events, &port, epoll::EventData::new_u64(0), interest)?;
        let events = readiness::watch(events, Interest::READABLE)?;
        Ok(Self { port, events, readable: false, writable: false, connected: false })
    }

    /// Waits for news of the port, and notes them.
    fn poll_events(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.events.poll_read_ready(cx))?;
            let mut event = [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }];
            let nothing = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
            if epoll::wait(self.events.get_ref(), &mut event, Some(&nothing))? == 0 {
                guard.clear_ready();
                continue;
            }
            let flags = event[0].flags;
            self.readable |= flags.intersects(epoll::EventFlags::IN | epoll::EventFlags::HUP);
            self.writable |= flags.contains(epoll::EventFlags::OUT);
            self.connected = !flags.contains(epoll::EventFlags::HUP);
            return Poll::Ready(Ok(()));
        }
    }
}

impl AsyncRead for Serial {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            while !self.readable {
                ready!(self.poll_events(cx))?;
            }
            match rustix::io::read(&self.port, buffer.initialize_unfilled()) {
                Ok(read) => {
                    buffer.advance(read);
                    return Poll::Ready(Ok(()));
                }
                Err(Errno::AGAIN) => self.readable = false,
                Err(Errno::INTR) => {}
                Err(errno) => return Poll::Ready(Err(errno.into())),
            }
        }
    }
}

impl AsyncWrite for Serial {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            while !self.writable {
                ready!(self.poll_events(cx))?;
            }
            match rustix::io::write(&self.port, bytes) {
                Ok(written) => return Poll::Ready(Ok(written)),
                Err(Errno::AGAIN) => self.writable = false,
                Err(Errno::INTR) => {}
                Err(errno) => return Poll::Ready(Err(errno.into())),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// Finds the device file of the port, waiting for the kernel's events until it has the port and its name.
async fn find() -> io::Result<PathBuf> {
    let events = device_events()?;
    loop {
        if let Some(path) = look() {
            return Ok(path);
        }
        let mut ready = events.readable().await?;
        while rustix::net::recv(ready.get_inner(), &mut [0; 4096], RecvFlags::empty()).is_ok() {}
        ready.clear_ready();
    }
}

fn look() -> Option<PathBuf> {
    let ports = fs::read_dir("/sys/class/virtio-ports").ok()?;
    ports.flatten().find_map(|port| {
        let name = fs::read_to_string(port.path().join("name")).ok()?;
        (name.trim_end() == SERIAL_PORT_NAME).then(|| PathBuf::from("/dev").join(port.file_name()))
    })
}

fn device_events() -> io::Result<AsyncFd<OwnedFd>> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let protocol = Some(netlink::KOBJECT_UEVENT);
    let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, protocol)?;
    rustix::net::bind(&socket, &SocketAddrNetlink::new(0, KERNEL_EVENTS))?;
    readiness::watch(socket, Interest::READABLE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    #[tokio::test]
    async fn bytes_pass_both_ways_with_backpressure() {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (ours, theirs) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
        let (mut ours, mut theirs) = (Serial::over(ours).unwrap(), Serial::over(theirs).unwrap());
        let sent: Vec<u8> = (0..4_000_000u32).map(|index| index.to_le_bytes()[0]).collect();
        let expected = sent.clone();
        let writing = tokio::spawn(async move {
            ours.write_all(&sent).await.unwrap();
            let mut answer = [0; 2];
            ours.read_exact(&mut answer).await.unwrap();
            assert_eq!(&answer, b"ok");
        });
        let mut received = vec![0; expected.len()];
        theirs.read_exact(&mut received).await.unwrap();
        assert!(received == expected);
        theirs.write_all(b"ok").await.unwrap();
        writing.await.unwrap();
        assert_eq!(theirs.read(&mut [0]).await.unwrap(), 0, "the other side is gone");
    }
}
