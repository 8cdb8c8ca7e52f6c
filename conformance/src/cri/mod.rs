//! Kubernetes' road to a runtime: a private containerd with its CRI plugin, and the client, pods and containers of its cases.
//!
//! What the kubelet does is done here by [`Cri`], [`Pod`] and [`Container`]: thin handles over the CRI's own messages, which
//! a case changes by closures where the defaults are not what it is about.

mod client;
mod engine;
mod log;
mod pod;
mod stream;

pub use client::Client;
pub use engine::{Engine, Release};
pub use k8s_cri::v1;
pub use log::Line;
pub use pod::{Container, Cri, IMAGE, Pod, pod_security, security};
pub use stream::{Forwarded, Stream};
