//! The header that every packet begins with. Layout and numbers are those of the specification's section 5.10.6.

/// The length of a header, in bytes.
pub(super) const SIZE: usize = 44;

/// Connections are streams; the device has no other type.
pub(super) const STREAM: u16 = 1;

/// A SHUTDOWN's flag: its sender receives no more.
pub(super) const NO_RECEIVE: u32 = 1;
/// A SHUTDOWN's flag: its sender sends no more.
pub(super) const NO_SEND: u32 = 2;
/// Both flags.
pub(super) const NEITHER: u32 = NO_RECEIVE | NO_SEND;

/// What a packet says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Op {
    Request = 1,
    Response = 2,
    Reset = 3,
    Shutdown = 4,
    Data = 5,
    CreditUpdate = 6,
    CreditRequest = 7,
}

impl Op {
    fn from_number(number: u16) -> Option<Self> {
        use Op::{CreditRequest, CreditUpdate, Data, Request, Reset, Response, Shutdown};
        let all = [Request, Response, Reset, Shutdown, Data, CreditUpdate, CreditRequest];
        all.into_iter().find(|&op| op as u16 == number)
    }
}

/// A header, as the guest wrote it or will read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    /// The length of the payload, in bytes.
    pub(super) len: u32,
    pub(super) kind: u16,
    /// None where the specification has no such operation.
    pub(super) op: Option<Op>,
    pub(super) flags: u32,
    /// How many bytes the sender's end of the connection can hold.
    pub(super) buf_alloc: u32,
    /// How many bytes have left the sender's end, modulo 2^32.
    pub(super) fwd_cnt: u32,
}

impl Header {
    pub(super) fn parse(bytes: &[u8; SIZE]) -> Self {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        Self {
            src_cid: u64_at(0),
            dst_cid: u64_at(8),
            src_port: u32_at(16),
            dst_port: u32_at(20),
            len: u32_at(24),
            kind: u16_at(28),
            op: Op::from_number(u16_at(30)),
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
        }
    }

    pub(super) fn to_bytes(self) -> [u8; SIZE] {
        let op = self.op.map_or(0, |op| op as u16);
        let fields: [&[u8]; 10] = [
            &self.src_cid.to_le_bytes(),
            &self.dst_cid.to_le_bytes(),
            &self.src_port.to_le_bytes(),
            &self.dst_port.to_le_bytes(),
            &self.len.to_le_bytes(),
            &self.kind.to_le_bytes(),
            &op.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.buf_alloc.to_le_bytes(),
            &self.fwd_cnt.to_le_bytes(),
        ];
        let mut bytes = [0; SIZE];
        let mut rest = &mut bytes[..];
        for field in fields {
            let (place, following) = rest.split_at_mut(field.len());
            place.copy_from_slice(field);
            rest = following;
        }
        bytes
    }

    /// The answer that there is no such connection.
    pub(super) fn refusal(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            len: 0,
            kind: self.kind,
            op: Some(Op::Reset),
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_as_the_specification_lays_them_out() {
        let header = Header {
            src_cid: 0x0102_0304_0506_0708,
            dst_cid: 2,
            src_port: 0x1112_1314,
            dst_port: 3,
            len: 0x2122_2324,
            kind: STREAM,
            op: Some(Op::CreditUpdate),
            flags: NEITHER,
            buf_alloc: 0x3132_3334,
            fwd_cnt: 0x4142_4344,
        };
        let bytes = header.to_bytes();
        assert_eq!(bytes[..16], [8, 7, 6, 5, 4, 3, 2, 1, 2, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[16..28], [0x14, 0x13, 0x12, 0x11, 3, 0, 0, 0, 0x24, 0x23, 0x22, 0x21]);
        assert_eq!(bytes[28..36], [1, 0, 6, 0, 3, 0, 0, 0]);
        assert_eq!(bytes[36..], [0x34, 0x33, 0x32, 0x31, 0x44, 0x43, 0x42, 0x41]);
        assert_eq!(Header::parse(&bytes), header);
    }

    #[test]
    fn operations_that_there_are_not_are_none() {
        for (number, known) in [(0, false), (1, true), (7, true), (8, false), (u16::MAX, false)] {
            assert_eq!(Op::from_number(number).is_some(), known, "{number}");
        }
    }
}
