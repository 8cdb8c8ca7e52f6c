//! How containerd tells a shim what it may say, and how it is answered.
//!
//! containerd 2.3 and later write a `BootstrapParams` to `start`'s stdin and take a `BootstrapResult`. Those before
//! write the runtime's options, or nothing; 1.6 takes a plain address only, 1.7 and 2.0 to 2.2 one as well as JSON, but
//! do not tell of themselves which versions of the JSON they take. So all of them get the plain address, which means the
//! second version of the task service: this shim's third is the same but for its name.

use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use protobuf::Message as _;

use super::{Address, BootstrapError, Flags, Result};

/// The version of the task service that containerd 2.3 is told to speak.
const TASK_SERVICE: i32 = 3;

/// Which way containerd speaks.
pub enum Parameters {
    /// By a message.
    Message(Box<BootstrapParams>),
    /// By flags and the environment.
    Plain,
}

impl Parameters {
    /// Reads what was on stdin. The options of a runtime may parse as parameters, too, but never name the container.
    pub fn read(input: &[u8], flags: &Flags) -> Self {
        match BootstrapParams::parse_from_bytes(input) {
            Ok(message)
                if !input.is_empty() && message.instance_id == flags.id && message.namespace == flags.namespace =>
            {
                Self::Message(Box::new(message))
            }
            _ => Self::Plain,
        }
    }

    /// The folder that the socket is wanted in.
    pub fn socket_folder(&self) -> Option<&str> {
        match self {
            Self::Message(message) => message.socket_dir.as_deref().filter(|folder| !folder.is_empty()),
            Self::Plain => None,
        }
    }

    /// Where containerd takes events, if the message says so.
    pub fn events_address(&self) -> Option<&str> {
        match self {
            Self::Message(message) => {
                Some(message.containerd_ttrpc_address.as_str()).filter(|address| !address.is_empty())
            }
            Self::Plain => None,
        }
    }

    /// Whether more than usual is to be logged.
    pub fn debug(&self) -> bool {
        match self {
            // Open-ended, and lower for more.
            Self::Message(message) => message.log_level.value() < 0,
            Self::Plain => false,
        }
    }

    /// What `start` prints.
    ///
    /// # Errors
    /// [`BootstrapError::Message`].
    pub fn answer(&self, address: &Address) -> Result<Vec<u8>> {
        match self {
            Self::Plain => Ok(address.to_string().into_bytes()),
            Self::Message(_) => {
                let result = BootstrapResult {
                    version: TASK_SERVICE,
                    address: address.to_string(),
                    protocol: "ttrpc".to_owned(),
                    ..Default::default()
                };
                result.write_to_bytes().map_err(BootstrapError::message("write the answer"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use protobuf::well_known_types::any::Any;

    fn flags() -> Flags {
        Flags { id: "a".into(), namespace: "k8s.io".into(), ..Flags::default() }
    }

    #[test]
    fn a_message_is_answered_by_one() {
        let message = BootstrapParams {
            instance_id: "a".into(),
            namespace: "k8s.io".into(),
            socket_dir: Some("/s".into()),
            containerd_ttrpc_address: "/run/t".into(),
            ..Default::default()
        };
        let parameters = Parameters::read(&message.write_to_bytes().unwrap(), &flags());
        assert_eq!((parameters.socket_folder(), parameters.events_address()), (Some("/s"), Some("/run/t")));
        let address = Address::of(None, "c", "n", "g");
        let answer = BootstrapResult::parse_from_bytes(&parameters.answer(&address).unwrap()).unwrap();
        assert_eq!((answer.version, answer.protocol.as_str()), (3, "ttrpc"));
        assert_eq!(answer.address, address.to_string());
    }

    #[test]
    fn all_else_is_answered_by_the_address() {
        let options = Any { type_url: "a".into(), value: vec![1], ..Default::default() };
        let address = Address::of(None, "c", "n", "g");
        for input in [Vec::new(), options.write_to_bytes().unwrap(), b"\xff\xff".to_vec()] {
            let parameters = Parameters::read(&input, &flags());
            assert_eq!(parameters.answer(&address).unwrap(), address.to_string().into_bytes());
            assert_eq!(parameters.socket_folder(), None);
        }
    }
}
