//! Messages on the wire, and how they are wrapped.

use std::time::SystemTime;

use protobuf::MessageFull;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;

/// What of Kubernetes's interfaces is read.
#[allow(warnings, reason = "generated")]
pub mod options {
    include!(concat!(env!("OUT_DIR"), "/options.rs"));
}

/// How a stream of containerd's streaming service begins.
#[allow(warnings, reason = "generated")]
pub mod streaming {
    include!(concat!(env!("OUT_DIR"), "/streaming.rs"));
}

/// What such a stream carries.
#[allow(warnings, reason = "generated")]
pub mod transfer {
    include!(concat!(env!("OUT_DIR"), "/transfer.rs"));
}

/// A message with the name that containerd knows it by, which is its full one and nothing before it.
///
/// # Errors
/// Those of encoding it.
pub fn any<M: MessageFull>(message: &M) -> protobuf::Result<Any> {
    let type_url = M::descriptor().full_name().to_owned();
    Ok(Any { type_url, value: message.write_to_bytes()?, ..Default::default() })
}

/// What is wrapped in there; none where it is another message, or none at all.
pub fn unwrap<M: MessageFull>(wrapped: &Any) -> Option<M> {
    let name = wrapped.type_url.rsplit('/').next()?;
    (name == M::descriptor().full_name()).then(|| M::parse_from_bytes(&wrapped.value).ok()).flatten()
}

/// A moment as containerd has it.
pub fn timestamp(time: SystemTime) -> Timestamp {
    // The conversion of the library panics where the clock is absurd.
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or(0),
        ..Default::default()
    }
}
