//! The flags of a shim, in the style of Go: one dash or two, and a value as a word of its own or behind `=`.

use std::path::PathBuf;

use super::{BootstrapError, Result};

/// What a shim is told by its command line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Flags {
    /// Log stages and decisions.
    pub debug: bool,
    /// Print the version.
    pub version: bool,
    /// Print what the runtime is, as a message.
    pub info: bool,
    /// containerd's namespace.
    pub namespace: String,
    /// The container.
    pub id: String,
    /// containerd's own address.
    pub address: String,
    /// The program that events are given to where containerd has no address for them.
    pub publish_binary: String,
    /// The bundle, where it is not the working folder.
    pub bundle: Option<PathBuf>,
    /// Where this shim is reached; from `start` to the server.
    pub socket: String,
    /// `start`, `delete`, or nothing to serve.
    pub action: String,
}

impl Flags {
    /// Reads the words after the program's name. Flags end with the first word that is none.
    ///
    /// # Errors
    /// [`BootstrapError::Flag`].
    pub fn parse(arguments: &[String]) -> Result<Self> {
        let mut flags = Self::default();
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            let Some(flag) = argument.strip_prefix("--").or_else(|| argument.strip_prefix('-')) else {
                flags.action.clone_from(argument);
                break;
            };
            let (name, value) = flag.split_once('=').map_or((flag, None), |(name, value)| (name, Some(value)));
            if let Some(switch) = flags.switch(name) {
                *switch = match value {
                    None | Some("true" | "1") => true,
                    Some("false" | "0") => false,
                    Some(other) => return Err(BootstrapError::Flag(format!("-{name}={other}: say true or false"))),
                };
                continue;
            }
            let missing = || BootstrapError::Flag(format!("-{name} needs a value"));
            let value = value.map(str::to_owned).or_else(|| arguments.next().cloned()).ok_or_else(missing);
            flags.set(name, value)?;
        }
        Ok(flags)
    }

    fn switch(&mut self, name: &str) -> Option<&mut bool> {
        match name {
            "debug" => Some(&mut self.debug),
            "v" | "version" => Some(&mut self.version),
            "info" => Some(&mut self.info),
            _ => None,
        }
    }

    fn set(&mut self, name: &str, value: Result<String>) -> Result<()> {
        match name {
            "namespace" => self.namespace = value?,
            "id" => self.id = value?,
            "address" => self.address = value?,
            "publish-binary" => self.publish_binary = value?,
            "bundle" => self.bundle = Some(value?.into()),
            "socket" => self.socket = value?,
            // Go's, for a profiler that is not here.
            "debug-socket" => drop(value?),
            _ => return Err(BootstrapError::Flag(format!("there is no flag -{name}"))),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Flags> {
        Flags::parse(&line.split(' ').map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn containerds_command_lines_are_understood() {
        let flags = parse("-namespace k8s.io -address /run/c.sock -publish-binary /bin/c -id a -debug start").unwrap();
        let expected = Flags {
            debug: true,
            namespace: "k8s.io".into(),
            id: "a".into(),
            address: "/run/c.sock".into(),
            publish_binary: "/bin/c".into(),
            action: "start".into(),
            ..Flags::default()
        };
        assert_eq!(flags, expected);
        let flags = parse("--namespace=n --bundle=/b -debug=false delete -id x").unwrap();
        assert_eq!((flags.bundle, flags.debug, flags.action.as_str()), (Some("/b".into()), false, "delete"));
        assert_eq!(flags.id, "");
        assert!(parse("-v").unwrap().version && parse("-info").unwrap().info);
    }

    #[test]
    fn what_is_no_flag_is_named() {
        for (line, reason) in
            [("-nope x", "no flag -nope"), ("-id", "-id needs a value"), ("-debug=maybe", "-debug=maybe")]
        {
            assert!(parse(line).unwrap_err().to_string().contains(reason), "{line}");
        }
    }
}
