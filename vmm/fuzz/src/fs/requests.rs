//! What FUSE's requests are made of.

use arbitrary::{Result, Unstructured};

use super::NAMES;
use crate::guest::length;

/// A part of a request.
#[derive(Clone, Copy, Debug)]
enum Part {
    /// A file's number in the session, 64 bits.
    Node,
    /// An open file, 64 bits.
    Handle,
    /// A place in a file, or how much of it, 64 bits.
    Offset,
    /// How much there is, or is wanted, 32 bits.
    Size,
    /// Of `open` and others, 32 bits.
    Flags,
    /// Of a file, 32 bits.
    Mode,
    /// 32 bits.
    Small,
    /// 64 bits.
    Large,
    /// 32 bits of nothing.
    Zero,
    /// What ends with a zero.
    Name,
    /// The name of an extended attribute.
    Attribute,
    /// Contents.
    Blob,
    /// What is said of a file that is made: its security context, and the groups of who makes it.
    Extensions,
    /// The highest version that both sides know, 32 bits each.
    Version,
}

use Part::{Attribute, Blob, Extensions, Flags, Handle, Large, Mode, Name, Node, Offset, Size, Small, Version, Zero};

/// A kind of request: its number and its parts.
#[derive(Clone, Copy, Debug)]
pub struct Opcode(u32, &'static [Part]);

/// It begins a session.
const INIT: Opcode = Opcode(26, &[Version, Small, Large, Large, Large, Large, Large, Large]);

const OPENING: [Opcode; 5] = [
    Opcode(1, &[Name]),
    Opcode(14, &[Flags, Zero]),
    Opcode(27, &[Flags, Zero]),
    Opcode(35, &[Flags, Mode, Small, Flags, Name, Extensions]),
    Opcode(9, &[Mode, Small, Name, Extensions]),
];

const URGENT: [Opcode; 3] =
    [Opcode(2, &[Large]), Opcode(42, &[Small, Zero, Node, Large, Node, Large]), Opcode(36, &[Large])];

const OTHERS: [Opcode; 30] = [
    Opcode(3, &[Small, Zero, Handle]),
    Opcode(
        4,
        &[Small, Zero, Handle, Offset, Large, Large, Large, Large, Small, Small, Small, Mode, Zero, Small, Small, Zero],
    ),
    Opcode(5, &[]),
    Opcode(6, &[Name, Name, Extensions]),
    Opcode(8, &[Mode, Small, Small, Zero, Name, Extensions]),
    Opcode(10, &[Name]),
    Opcode(11, &[Name]),
    Opcode(12, &[Node, Name, Name]),
    Opcode(13, &[Node, Name]),
    Opcode(15, &[Handle, Offset, Size, Small, Large, Flags, Zero]),
    Opcode(16, &[Handle, Offset, Size, Small, Large, Flags, Zero, Blob]),
    Opcode(17, &[]),
    Opcode(18, &[Handle, Flags, Small, Large]),
    Opcode(20, &[Handle, Small, Zero]),
    Opcode(21, &[Size, Small, Small, Zero, Attribute, Blob]),
    Opcode(22, &[Size, Zero, Attribute]),
    Opcode(23, &[Size, Zero]),
    Opcode(24, &[Attribute]),
    Opcode(25, &[Handle, Zero, Zero, Large]),
    Opcode(28, &[Handle, Offset, Size, Small, Large, Flags, Zero]),
    Opcode(29, &[Handle, Flags, Small, Large]),
    Opcode(30, &[Handle, Small, Zero]),
    Opcode(34, &[Small, Zero]),
    Opcode(38, &[]),
    Opcode(43, &[Handle, Offset, Offset, Small, Zero]),
    Opcode(44, &[Handle, Offset, Size, Small, Large, Flags, Zero]),
    Opcode(45, &[Node, Small, Zero, Name, Name]),
    Opcode(46, &[Handle, Offset, Small, Zero]),
    Opcode(47, &[Handle, Offset, Node, Handle, Offset, Offset, Large]),
    // Those without a system call behind them: locks, `ioctl` and the like are some of these.
    Opcode(51, &[Large, Large, Large]),
];

impl Opcode {
    /// One of all.
    pub fn any(u: &mut Unstructured<'_>) -> Result<Self> {
        match u.int_in_range(0..=39)? {
            0 => Self::urgent(u),
            1..=7 => Self::opening(u),
            8 => Ok(INIT),
            9 => Ok(Self(u.int_in_range(0..=52)?, &[Large, Large, Large, Blob])),
            _ => u.choose(&OTHERS).copied(),
        }
    }

    /// One of those that make files known or open.
    pub fn opening(u: &mut Unstructured<'_>) -> Result<Self> {
        u.choose(&OPENING).copied()
    }

    /// One of those that nothing answers.
    pub fn urgent(u: &mut Unstructured<'_>) -> Result<Self> {
        u.choose(&URGENT).copied()
    }

    /// Its number.
    pub fn number(self) -> u32 {
        self.0
    }

    /// What follows the header.
    pub fn arguments(self, u: &mut Unstructured<'_>) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        for part in self.1 {
            part.append(u, &mut bytes)?;
        }
        Ok(bytes)
    }
}

impl Part {
    fn append(self, u: &mut Unstructured<'_>, bytes: &mut Vec<u8>) -> Result<()> {
        match self {
            Node => bytes.extend(number(u, 4)?.to_le_bytes()),
            Handle => {
                let handle = if u.arbitrary()? { u.int_in_range(0..=1)? } else { number(u, 6)? };
                bytes.extend(handle.to_le_bytes());
            }
            Offset => {
                let offset = *u.choose(&[0, 1, 7, 4095, 4096, 1 << 20, 1 << 33, i64::MAX as u64, 1 << 63, u64::MAX])?;
                bytes.extend(offset.to_le_bytes());
            }
            Size => bytes.extend(length(u)?.to_le_bytes()),
            Flags => {
                // Reading, writing, both; made, truncated, appended to, past the cache, a directory, a path, a nameless file.
                let some = [0u32, 1, 2, 0o102, 0o1002, 0o2002, 0o4_0002, 0o20_0000, 0o1000_0000, 0o2020_0002];
                bytes.extend(u.choose(&some)?.to_le_bytes());
            }
            Mode => {
                let kind = *u.choose(&[0o10, 0o4, 0o1, 0o2, 0o6, 0o12, 0o14])? << 12;
                let mode: u32 = kind | u.int_in_range(0..=0o7777)?;
                bytes.extend(mode.to_le_bytes());
            }
            Small => {
                let small = if u.ratio(1, 4)? { u.arbitrary()? } else { u32::from(u.arbitrary::<u8>()?) };
                bytes.extend(small.to_le_bytes());
            }
            Large => bytes.extend(number(u, 255)?.to_le_bytes()),
            Zero => bytes.extend([0; 4]),
            Name => {
                let name = u.choose(&NAMES)?;
                bytes.extend(name.as_bytes());
                bytes.push(0);
            }
            Attribute => {
                let names =
                    ["user.x", "trusted.x", "security.capability", "system.posix_acl_access", "user.virtiofs.", ""];
                let name = u.choose(&names)?;
                bytes.extend(name.as_bytes());
                bytes.push(0);
            }
            Blob => {
                let length = u.int_in_range(0..=96)?;
                bytes.extend(u.bytes(length.min(u.len()))?);
            }
            Extensions => {
                match u.int_in_range(0..=4)? {
                    0 => {}
                    1 => Blob.append(u, bytes)?,
                    2 | 3 => bytes.extend(extension(0, &[])),
                    _ => bytes.extend(extension(1, b"\x04\0\0\0\0\0\0\0security.x\0abcd")),
                }
                if u.ratio(1, 4)? {
                    // One group, with this number.
                    bytes.extend(extension(32, &[1, 0, 0, 0, 7, 0, 0, 0]));
                }
            }
            Version => bytes.extend([7u32, 38].map(u32::to_le_bytes).as_flattened()),
        }
        Ok(())
    }
}

fn extension(kind: u32, body: &[u8]) -> Vec<u8> {
    [&(8 + body.len() as u32).to_le_bytes()[..], &kind.to_le_bytes(), body].concat()
}

/// A small number, mostly.
fn number(u: &mut Unstructured<'_>, small: u64) -> Result<u64> {
    if u.ratio(1, 16)? { u.arbitrary() } else { u.int_in_range(0..=small) }
}
