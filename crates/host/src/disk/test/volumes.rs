//! Volumes over images.

use super::*;
use crate::disk::{VolumeDir, VolumeSpec};
use whimbrel_wire::ImageId;

const IMAGE: ImageId = ImageId([3; 32]);

fn image(length: usize) -> Option<crate::disk::BaseImage> {
    Some((IMAGE, RamDisk::new(half_full(length))))
}

#[test]
fn a_volume_is_its_image_and_zeros_behind_it() {
    let dir = temp_dir();
    let volumes = VolumeDir::new(dir.path()).unwrap();
    let made = VolumeSpec { image: Some((IMAGE, 10_240)), size_bytes: Some(40_960), epoch: Epoch(1) };
    let spec = made.layer().unwrap();
    volumes.create(&spec).unwrap();
    assert_eq!(volumes.list().unwrap(), [spec.disk_id]);
    let layer = volumes.open(spec.disk_id, image(10_240), Epoch(1), true).unwrap();
    let mut oracle = half_full(10_240);
    oracle.resize(40_960, 0);
    assert!(read_all(&*layer) == oracle);
    // A write over the image's end, where the last block is half image, half nothing.
    oracle[9728..10_752].fill(7);
    write(&*layer, 9728, &oracle[9728..10_752]).unwrap();
    assert!(read_all(&*layer) == oracle);
    let reports = volumes.check(spec.disk_id, Some(IMAGE)).unwrap();
    assert!(reports[0].problems.is_empty(), "{:?}", reports[0].problems);
    assert_eq!(reports[0].data_bytes, 4096);
    drop(layer);
    let wrong = Some((ImageId([4; 32]), RamDisk::new(half_full(10_240)) as Arc<dyn BlockRead>));
    assert_eq!(volumes.open(spec.disk_id, wrong, Epoch(1), true).unwrap_err().kind(), ErrorKind::Refused);
    assert!(!volumes.check(spec.disk_id, None).unwrap()[0].problems.is_empty());
    volumes.remove(spec.disk_id).unwrap();
    assert_eq!(volumes.open(spec.disk_id, None, Epoch(1), true).unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn a_volume_has_a_size_and_is_not_smaller_than_its_image() {
    let spec = |image, size_bytes| VolumeSpec { image, size_bytes, epoch: Epoch(1) }.layer();
    assert_eq!(spec(Some((IMAGE, 1000)), None).unwrap().size_bytes, 1024);
    assert_eq!(spec(None, Some(4096)).unwrap().size_bytes, 4096);
    assert_eq!(spec(None, None).unwrap_err().kind(), ErrorKind::InvalidInput);
    assert_eq!(spec(Some((IMAGE, 8192)), Some(4096)).unwrap_err().kind(), ErrorKind::InvalidInput);
}
