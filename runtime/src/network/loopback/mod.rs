//! What is asked of the loopback in the network namespace, handed on to the guest's.
//!
//! The programs of a pod listen on the guest's loopback, and engines connect to the namespace's: that is how
//! containerd forwards ports. The kernel hands every TCP connection to 127.0.0.1 and ::1 there, whatever its port, to one
//! socket of ours (`steer`), and each goes on as a stream to the agent, which connects to that port in the guest.
//! Who can connect there is in the namespace on the host already; the guest can open nothing by this.

mod steer;

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;

use runvm_protocol::ports;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::AbortHandle;

use crate::agent::Agent;

/// How many connections there are at once; further ones wait.
const MAX_CONNECTIONS: usize = 64;

/// Connections are handed on as long as this is there.
pub struct Loopback {
    accepting: AbortHandle,
    _steering: OwnedFd,
}

impl Drop for Loopback {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// Hands connections to the loopback of the calling thread's network namespace on to a guest.
///
/// # Errors
/// Those of listening, and of the kernel where it cannot steer connections (before Linux 5.9, or without BPF).
pub async fn hand_on(agent: Agent) -> io::Result<Loopback> {
    // One socket for both families, where the host has both.
    let listener = match TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0)).await {
        Ok(listener) => listener,
        Err(_) => TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?,
    };
    let steering = steer::to(listener.as_fd())?;
    let accepting = tokio::spawn(accept(listener, agent)).abort_handle();
    Ok(Loopback { accepting, _steering: steering })
}

async fn accept(listener: TcpListener, agent: Agent) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    while let Ok(place) = places.clone().acquire_owned().await {
        match listener.accept().await {
            Ok((connection, _)) => {
                let agent = agent.clone();
                tokio::spawn(async move {
                    if let Err(error) = carry(connection, &agent).await {
                        tracing::debug!("a connection to the guest's loopback ends: {error}");
                    }
                    drop(place);
                });
            }
            Err(error) => return tracing::warn!("no more connections to the guest's loopback: {error}"),
        }
    }
}

async fn carry(mut connection: TcpStream, agent: &Agent) -> io::Result<()> {
    let wanted = connection.local_addr()?.port();
    let mut stream = agent.open(ports::LOOPBACK).await.map_err(io::Error::other)?;
    ports::name_port(&mut stream, wanted).await?;
    copy_bidirectional(&mut connection, &mut stream).await.map(drop)
}
