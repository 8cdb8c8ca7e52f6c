//! What a VM's owner and its process say to each other.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use runvm_vmm::machine::Flavour;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncWriteExt as _, Interest};
use tokio::net::UnixStream;

use crate::share::{Export, SetupError};

/// How many descriptors one message carries at most: `SCM_MAX_FD` in net/scm.h.
const MAX_DESCRIPTORS: usize = 253;
/// How much is read of a description at a time, in bytes.
const CHUNK: usize = 16 << 10;

/// How many devices there are before the network's.
pub(super) const FIRST_NIC: usize = 4;

/// What a VM's process is to make.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Description {
    pub flavour: Flavour,
    pub vcpus: u32,
    /// In bytes.
    pub memory: u64,
    pub exports: Vec<Export>,
    /// The addresses of the network devices, which are the last devices.
    pub macs: Vec<[u8; 6]>,
    /// How many of those the guest is not told of.
    pub spare: usize,
    pub beginning: Beginning,
}

/// How a machine begins.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Beginning {
    /// With its kernel's first instruction.
    Boot {
        kernel: PathBuf,
        initramfs: PathBuf,
        parameters: String,
        console: Option<PathBuf>,
        /// Whether it is to be written into the template's files once its agent listens.
        save: bool,
    },
    /// Where a template ended.
    Restore,
}

/// What a VM's process says once: the guest's agent listens, or why there is none.
pub(super) type Report = Result<Saving, Failure>;

/// What became of the template.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Saving {
    /// There was to be none.
    NotAsked,
    /// It is written.
    Done,
    /// It is not; why, as a clause.
    Failed(String),
}

/// Why there is no machine, fit to cross between processes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Failure {
    /// The user's files.
    Share(SetupError),
    /// The guest switched its machine off before its agent listened.
    GaveUp,
    /// Everything else, as a clause.
    Machine(String),
}

impl Description {
    /// Sends it to a VM's process, with the doorway, a tap for each network device, and a template's state and memory where the
    /// machine begins as one or becomes one.
    pub(super) async fn send(&self, control: &mut UnixStream, descriptors: &[OwnedFd]) -> io::Result<()> {
        let text = serde_json::to_vec(self)?;
        let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(descriptors.len()))];
        let sent = control.async_io(Interest::WRITABLE, || {
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
            Ok(sendmsg(&*control, &[IoSlice::new(&text)], &mut ancillary, SendFlags::NOSIGNAL)?)
        });
        let sent = sent.await?;
        control.write_all(&text[sent..]).await?;
        control.shutdown().await
    }

    /// Receives one, and its descriptors; none where the owner has none.
    pub(super) fn receive(control: impl AsFd) -> io::Result<Option<(Self, Vec<OwnedFd>)>> {
        let (mut text, mut descriptors) = (Vec::new(), Vec::new());
        let mut chunk = vec![0; CHUNK];
        loop {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let received = rustix::io::retry_on_intr(|| {
                recvmsg(&control, &mut [IoSliceMut::new(&mut chunk)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)
            })?;
            for message in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(received) = message {
                    descriptors.extend(received);
                }
            }
            match received.bytes {
                0 if text.is_empty() => return Ok(None),
                0 => return Ok(Some((serde_json::from_slice(&text)?, descriptors))),
                bytes => text.extend_from_slice(&chunk[..bytes]),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Seek as _, SeekFrom, Write as _};

    fn description(exports: usize) -> Description {
        let export = |index| Export {
            path: format!("guest/{index}").into(),
            source: format!("/host/{index}").into(),
            read_only: false,
            recursive: true,
            id_map: None,
        };
        Description {
            flavour: Flavour::Pvm,
            vcpus: 2,
            memory: 1 << 30,
            exports: (0..exports).map(export).collect(),
            macs: vec![[2, 0, 0, 0, 0, 1]],
            spare: 1,
            beginning: Beginning::Restore,
        }
    }

    /// A file that is told by its length.
    fn file(length: u64) -> OwnedFd {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![0; length as usize]).unwrap();
        file.into()
    }

    #[tokio::test]
    async fn what_is_sent_is_received_with_its_descriptors() {
        // More than a socket takes at once.
        let sent = description(20_000);
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let theirs = theirs.into_std().unwrap();
        theirs.set_nonblocking(false).unwrap();
        let receiving = std::thread::spawn(move || Description::receive(&theirs).unwrap().unwrap());
        sent.send(&mut ours, &[1, 2, 3].map(file)).await.unwrap();
        let (received, descriptors) = receiving.join().unwrap();
        assert_eq!(serde_json::to_value(&received).unwrap(), serde_json::to_value(&sent).unwrap());
        let lengths = descriptors.into_iter().map(|file| std::fs::File::from(file).seek(SeekFrom::End(0)).unwrap());
        assert_eq!(lengths.collect::<Vec<_>>(), [1, 2, 3]);
    }

    #[test]
    fn an_owner_without_a_wish_is_told_from_one_who_breaks_off() {
        let end = |said: &[u8]| {
            let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
            ours.write_all(said).unwrap();
            drop(ours);
            Description::receive(&theirs)
        };
        assert!(end(b"").unwrap().is_none());
        assert!(end(b"{\"flavour\":").is_err());
    }
}
