//! As much of ttrpc and of protocol buffers as it takes to answer, and to answer wrongly.

use std::io::{self, Read};

/// What is before a message: its length, its stream, its kind and its flags.
pub(crate) const HEADER: usize = 10;
/// The kinds that a client may get.
pub(crate) const RESPONSE: u8 = 2;
pub(crate) const DATA: u8 = 3;

/// A request of the host's.
pub(crate) struct Request {
    pub(crate) stream: u32,
    pub(crate) method: String,
    /// The message in it.
    pub(crate) body: Vec<u8>,
}

impl Request {
    /// The next one.
    pub(crate) fn read(from: &mut impl Read) -> io::Result<Self> {
        let mut header = [0; HEADER];
        from.read_exact(&mut header)?;
        let number = |at: usize| u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let mut payload = vec![0; number(0) as usize];
        from.read_exact(&mut payload)?;
        let method = String::from_utf8_lossy(&bytes(&payload, 2)).into_owned();
        Ok(Self { stream: number(4), method, body: bytes(&payload, 3) })
    }
}

/// A message of that kind on a stream.
pub(crate) fn message(kind: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut message = header(payload.len() as u32, kind, stream);
    message.extend(payload);
    message
}

/// What is before a message of that length, which need not follow.
pub(crate) fn header(length: u32, kind: u8, stream: u32) -> Vec<u8> {
    [&length.to_be_bytes()[..], &stream.to_be_bytes(), &[kind, 0]].concat()
}

/// A response in which all is well.
pub(crate) fn success(stream: u32, body: &[u8]) -> Vec<u8> {
    message(RESPONSE, stream, &field(2, body))
}

/// A response that says no.
pub(crate) fn refusal(stream: u32, sentence: &str) -> Vec<u8> {
    let status = [number_field(1, 13), field(2, sentence.as_bytes())].concat();
    message(RESPONSE, stream, &field(1, &status))
}

/// A field of bytes.
pub(crate) fn field(tag: u8, bytes: &[u8]) -> Vec<u8> {
    [&[tag << 3 | 2][..], &varint(bytes.len() as u64), bytes].concat()
}

/// A field with a number.
pub(crate) fn number_field(tag: u8, value: u64) -> Vec<u8> {
    [&[tag << 3][..], &varint(value)].concat()
}

fn varint(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

/// The bytes of a field, empty where it is not there.
pub(crate) fn bytes(message: &[u8], tag: u64) -> Vec<u8> {
    fields(message).find(|(at, _, _)| *at == tag).map(|(_, _, bytes)| bytes.to_vec()).unwrap_or_default()
}

/// The number of a field, 0 where it is not there.
pub(crate) fn number(message: &[u8], tag: u64) -> u64 {
    fields(message).find(|(at, _, _)| *at == tag).map_or(0, |(_, number, _)| number)
}

/// All fields: tag, number, bytes. The host sends numbers and bytes only.
fn fields(mut rest: &[u8]) -> impl Iterator<Item = (u64, u64, &[u8])> {
    std::iter::from_fn(move || {
        let key = take_varint(&mut rest)?;
        let number = take_varint(&mut rest)?;
        if key & 7 == 0 {
            return Some((key >> 3, number, &[][..]));
        }
        let (bytes, after) = rest.split_at_checked(usize::try_from(number).ok()?)?;
        rest = after;
        Some((key >> 3, 0, bytes))
    })
}

fn take_varint(rest: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (&byte, after) = rest.split_first()?;
        *rest = after;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}
