use std::fs::OpenOptions;
use std::os::unix::fs::FileExt as _;

use vm_memory::{Bytes as _, GuestAddress};

use super::super::driver::{Driver, Piece};
use super::*;
use crate::confinement::{Role, in_role};

const OK: u8 = 0;
const IO: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// A driver, its disk, and the disk's image as the host sees it.
struct Disk {
    driver: Driver,
    device: Block,
    image: File,
}

/// Eight sectors, each filled with its number.
fn image() -> File {
    let image = tempfile::tempfile().unwrap();
    for sector in 0..8 {
        image.write_all_at(&[sector; 512], u64::from(sector) * SECTOR).unwrap();
    }
    image
}

fn disk_with(image: File, features: impl FnOnce(u64) -> u64) -> Disk {
    let mut device = Block::new(image.try_clone().unwrap(), "disk").unwrap();
    let mut driver = Driver::new(&device);
    driver.io.features = features(driver.io.features);
    device.start(&mut driver.io).unwrap();
    Disk { driver, device, image }
}

fn disk() -> Disk {
    disk_with(image(), |features| features)
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}

fn range(sector: u64, sectors: u32, flags: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&sector.to_le_bytes());
    bytes[8..12].copy_from_slice(&sectors.to_le_bytes());
    bytes[12..].copy_from_slice(&flags.to_le_bytes());
    bytes
}

impl Disk {
    /// Puts any pieces: how much the device says that it has written, and what there is.
    fn put(&mut self, pieces: &[Piece<'_>]) -> (u32, Vec<u8>) {
        let request = self.driver.put(0, pieces);
        self.device.queue_ready(&mut self.driver.io, 0).unwrap();
        let (head, written) = self.driver.used(0).unwrap();
        assert_eq!(head, request.head);
        (written, self.driver.written(&request))
    }

    /// Puts a request that reads nothing: its status.
    fn order(&mut self, kind: u32, sector: u64, data: &[u8]) -> u8 {
        let header = header(kind, sector);
        let (written, answer) = self.put(&[Piece::Readable(&header), Piece::Readable(data), Piece::Writable(1)]);
        assert_eq!((written, answer.len()), (1, 1));
        answer[0]
    }

    /// Reads: the status and the data.
    fn read(&mut self, kind: u32, sector: u64, bytes: u32) -> (u8, Vec<u8>) {
        let header = header(kind, sector);
        let (written, mut answer) = self.put(&[Piece::Readable(&header), Piece::Writable(bytes), Piece::Writable(1)]);
        let status = answer.pop().unwrap();
        assert_eq!(status == OK, written == bytes + 1, "{status} {written}");
        (status, answer)
    }

    fn sector(&self, sector: u64) -> [u8; 512] {
        let mut bytes = [0; 512];
        self.image.read_exact_at(&mut bytes, sector * SECTOR).unwrap();
        bytes
    }
}

#[test]
fn an_image_has_whole_sectors_and_can_be_read() {
    let image = tempfile::NamedTempFile::new().unwrap();
    for (size, sectors) in [(0, Some(0)), (512, Some(1)), (1 << 20, Some(2048)), (1, None), (513, None)] {
        image.as_file().set_len(size).unwrap();
        match (Block::new(image.reopen().unwrap(), ""), sectors) {
            (Ok(device), Some(sectors)) => assert_eq!(device.config().bytes()[..8], u64::to_le_bytes(sectors)),
            (Err(BlockError::Size(told)), None) => assert_eq!(told, size),
            other => panic!("{other:?}"),
        }
    }
    image.as_file().set_len(512).unwrap();
    let write_only = OpenOptions::new().write(true).open(image.path()).unwrap();
    assert!(matches!(Block::new(write_only, ""), Err(BlockError::Unreadable)));
}

#[test]
fn sectors_are_read_and_written() {
    let mut disk = disk();
    let (status, data) = disk.read(VIRTIO_BLK_T_IN, 6, 1024);
    assert_eq!((status, &data[..512], &data[512..]), (OK, &[6; 512][..], &[7; 512][..]));
    assert_eq!(disk.order(VIRTIO_BLK_T_OUT, 1, &[0xaa; 1024]), OK);
    assert_eq!((disk.sector(1), disk.sector(2), disk.sector(3)), ([0xaa; 512], [0xaa; 512], [3; 512]));
    assert_eq!(disk.order(VIRTIO_BLK_T_FLUSH, 0, &[]), OK);
    assert_eq!(disk.read(VIRTIO_BLK_T_GET_ID, 0, 20), (OK, b"disk".iter().copied().chain([0; 16]).collect()));
}

#[test]
fn requests_take_no_more_than_the_devices_thread_may() {
    let mut through = disk_with(image(), |features| features & !(1 << VIRTIO_BLK_F_FLUSH));
    let mut disk = disk();
    in_role(Role::Device(Kind::Block), || {
        assert_eq!(through.order(VIRTIO_BLK_T_OUT, 1, &[9; 512]), OK);
        assert_eq!(disk.order(VIRTIO_BLK_T_OUT, 1, &[9; 1024]), OK);
        assert_eq!(disk.read(VIRTIO_BLK_T_IN, 2, 512), (OK, vec![9; 512]));
        assert_eq!(disk.order(VIRTIO_BLK_T_FLUSH, 0, &[]), OK);
        for (kind, flags) in [(VIRTIO_BLK_T_DISCARD, 0), (VIRTIO_BLK_T_WRITE_ZEROES, 0), (VIRTIO_BLK_T_WRITE_ZEROES, 1)]
        {
            let status = disk.order(kind, 0, &range(0, 8, flags));
            assert!(matches!(status, OK | UNSUPPORTED), "{status}");
        }
    });
}

#[test]
fn writes_last_where_the_driver_knows_of_no_flush() {
    let mut disk = disk_with(image(), |features| features & !(1 << VIRTIO_BLK_F_FLUSH));
    assert!(disk.device.through);
    assert_eq!(disk.order(VIRTIO_BLK_T_OUT, 0, &[9; 512]), OK);
    assert_eq!(disk.sector(0), [9; 512]);
}

#[test]
fn a_request_may_be_cut_anywhere() {
    let mut disk = disk();
    let header = header(VIRTIO_BLK_T_IN, 5);
    let (first, second) = header.split_at(5);
    let pieces = [Piece::Readable(first), Piece::Readable(second), Piece::Writable(100), Piece::Writable(413)];
    let (written, answer) = disk.put(&pieces);
    assert_eq!((written, &answer[..512], answer[512]), (513, &[5; 512][..], OK));

    let request = [&self::header(VIRTIO_BLK_T_OUT, 0)[..], &[8; 512]].concat();
    let (first, second) = request.split_at(77);
    assert_eq!(disk.put(&[Piece::Readable(first), Piece::Readable(second), Piece::Writable(1)]), (1, vec![OK]));
    assert_eq!(disk.sector(0), [8; 512]);
}

#[test]
fn nothing_beyond_the_image_is_read_or_written() {
    let mut disk = disk();
    for (sector, sectors) in [(7, 2), (8, 1), (u64::MAX, 1), (u64::MAX / 512, 1), (1 << 55, 1), (1 << 63, 1)] {
        assert_eq!(disk.read(VIRTIO_BLK_T_IN, sector, sectors * 512).0, IO, "{sector}");
        let data = vec![1; sectors as usize * 512];
        assert_eq!(disk.order(VIRTIO_BLK_T_OUT, sector, &data), IO, "{sector}");
        assert_eq!(disk.order(VIRTIO_BLK_T_DISCARD, 0, &range(sector, sectors, 0)), IO, "{sector}");
    }
    for bytes in [1, 511, 513] {
        assert_eq!(disk.read(VIRTIO_BLK_T_IN, 0, bytes).0, IO);
        assert_eq!(disk.order(VIRTIO_BLK_T_OUT, 0, &vec![1; bytes as usize]), IO);
    }
    assert_eq!(disk.image.metadata().unwrap().len(), 8 * SECTOR);

    disk.image.set_len(4 * SECTOR).unwrap();
    assert_eq!(disk.read(VIRTIO_BLK_T_IN, 3, 512).0, OK);
    assert_eq!(disk.read(VIRTIO_BLK_T_IN, 3, 1024).0, IO);
}

#[test]
fn no_request_has_more_than_it_may() {
    let image = image();
    image.set_len(MAX_DATA as u64 + SECTOR).unwrap();
    let mut disk = disk_with(image, |features| features);
    assert_eq!(disk.device.config().bytes()[8..12], (1u32 << 16).to_le_bytes());
    // The same memory again and again, in a table of its own: a request need not have as much memory as it has data.
    let descriptor = |address: u64, length: u32, flags: u16, next: u16| {
        [&address.to_le_bytes()[..], &length.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat()
    };
    for (pieces, expected) in [(254, OK), (255, IO)] {
        disk.driver.io.memory.write_slice(&header(VIRTIO_BLK_T_IN, 0), GuestAddress(1 << 20)).unwrap();
        let mut table = descriptor(1 << 20, 16, 1, 1);
        for piece in 0..pieces {
            table.extend(descriptor(2 << 20, 1 << 16, 3, piece + 2));
        }
        table.extend(descriptor(3 << 20, 1, 2, 0));
        disk.driver.io.memory.write_slice(&table, GuestAddress(7 << 20)).unwrap();
        disk.put(&[Piece::Raw { address: 7 << 20, length: table.len() as u32, flags: 4, next: 0 }]);
        assert_eq!(disk.driver.io.memory.read_obj::<u8>(GuestAddress(3 << 20)).unwrap(), expected, "{pieces}");
    }
}

#[test]
fn a_disk_that_is_read_only_stays_as_it_is() {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().write_all_at(&[7; 512], 0).unwrap();
    let mut disk = disk_with(File::open(image.path()).unwrap(), |features| features);
    assert_eq!(disk.device.features() >> VIRTIO_BLK_F_RO & 1, 1);
    assert_eq!(disk.order(VIRTIO_BLK_T_OUT, 0, &[1; 512]), IO);
    assert_eq!(disk.order(VIRTIO_BLK_T_DISCARD, 0, &range(0, 1, 0)), IO);
    assert_eq!(disk.order(VIRTIO_BLK_T_WRITE_ZEROES, 0, &range(0, 1, 0)), IO);
    assert_eq!(disk.order(VIRTIO_BLK_T_FLUSH, 0, &[]), OK);
    assert_eq!(disk.read(VIRTIO_BLK_T_IN, 0, 512), (OK, vec![7; 512]));
}

#[test]
fn ranges_are_discarded_and_zeroed() {
    let mut disk = disk();
    let unmap = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
    let two = [range(0, 1, 0), range(2, 1, 0)].concat();
    let status = disk.order(VIRTIO_BLK_T_DISCARD, 0, &two);
    // Not every file system makes holes.
    assert!([OK, UNSUPPORTED].contains(&status));
    if status == OK {
        assert_eq!((disk.sector(0), disk.sector(1), disk.sector(2)), ([0; 512], [1; 512], [0; 512]));
    }
    for (sector, flags) in [(4, 0), (6, unmap)] {
        let status = disk.order(VIRTIO_BLK_T_WRITE_ZEROES, 0, &range(sector, 1, flags));
        assert!([OK, UNSUPPORTED].contains(&status));
        let first = if status == OK { 0 } else { sector as u8 };
        assert_eq!((disk.sector(sector), disk.sector(sector + 1)), ([first; 512], [sector as u8 + 1; 512]));
    }
    assert_eq!(disk.order(VIRTIO_BLK_T_DISCARD, 0, &range(0, 0, 0)), OK);
    assert_eq!(disk.image.metadata().unwrap().len(), 8 * SECTOR);

    for (kind, flags) in [(VIRTIO_BLK_T_DISCARD, unmap), (VIRTIO_BLK_T_WRITE_ZEROES, 2), (VIRTIO_BLK_T_DISCARD, !0)] {
        assert_eq!(disk.order(kind, 0, &range(7, 1, flags)), UNSUPPORTED);
    }
    for ranges in [&[][..], &[0; 15], &[0; 17], &[0; 17 * 16], &range(0, MAX_RANGE + 1, 0)] {
        assert_eq!(disk.order(VIRTIO_BLK_T_DISCARD, 0, ranges), IO);
    }
    assert_eq!(disk.sector(7), [7; 512]);
}

#[test]
fn malformed_requests_are_given_back_and_the_disk_goes_on() {
    let mut disk = disk();
    for kind in [2, 3, 5, 15, u32::MAX] {
        assert_eq!(disk.order(kind, 0, &[]), UNSUPPORTED, "{kind}");
    }
    let header = header(VIRTIO_BLK_T_IN, 0);
    // Nowhere to write a status.
    assert_eq!(disk.put(&[Piece::Readable(&header)]).0, 0);
    assert_eq!(disk.put(&[Piece::Readable(&header), Piece::Writable(0)]).0, 0);
    // No header.
    assert_eq!(disk.put(&[Piece::Writable(1)]), (1, vec![IO]));
    assert_eq!(disk.put(&[Piece::Readable(&header[..15]), Piece::Writable(1)]), (1, vec![IO]));
    // No such memory.
    for (address, length) in [(1 << 40, 513), (u64::MAX, 513), (0, u32::MAX), ((8 << 20) - 512, 513)] {
        let outside = Piece::Raw { address, length, flags: 2, next: 0 };
        assert_eq!(disk.put(&[Piece::Readable(&header), outside]).0, 0, "{address:x}");
    }
    assert_eq!(disk.read(VIRTIO_BLK_T_GET_ID, 0, 3), (OK, b"dis".to_vec()));
    assert_eq!(disk.read(VIRTIO_BLK_T_IN, 1, 512), (OK, vec![1; 512]));
}

#[test]
fn a_saved_disk_goes_on_with_an_image_of_its_size() {
    let saved = disk().device.save().unwrap();
    disk().device.restore(&saved).unwrap();
    let larger = image();
    larger.set_len(9 * SECTOR).unwrap();
    for (mut device, state) in
        [(disk_with(larger, |all| all).device, &saved[..]), (disk().device, &[]), (disk().device, &[8])]
    {
        assert!(matches!(device.restore(state), Err(DeviceError::State(_))), "{state:?}");
    }
}
