//! Headers, tables and links, against what the specification says in words.

use proptest::prelude::*;
use whimbrel_wire::record::vhdx::RegionEntry;

use super::*;

fn header(sequence: u64) -> Header {
    Header {
        sequence,
        file_write_id: Uuid::from_u128(1),
        data_write_id: Uuid::from_u128(2),
        log_id: Uuid::nil(),
        log_version: 0,
        version: 1,
        log_bytes: 1 << 20,
        log_offset: 1 << 20,
    }
}

#[test]
fn the_valid_header_with_the_higher_sequence_counts() {
    let (old, new) = (header(6), header(7));
    assert_eq!(current([Some(old.clone()), Some(new.clone())]).unwrap(), new);
    assert_eq!(current([Some(new.clone()), Some(old.clone())]).unwrap(), new);
    assert_eq!(current([Some(old.clone()), None]).unwrap(), old);
    assert_eq!(current([None, Some(old.clone())]).unwrap(), old);
    assert_eq!(current([Some(old.clone()), Some(old.clone())]).unwrap(), old);
    assert_eq!(current([None, None]).unwrap_err().kind, ErrorKind::Corrupt);
    let other = Header { data_write_id: Uuid::from_u128(9), ..old.clone() };
    assert_eq!(current([Some(old), Some(other)]).unwrap_err().kind, ErrorKind::Corrupt);
}

#[test]
fn a_header_that_asks_for_too_much_is_refused() {
    let refused = |header: Header| current([Some(header), None]).map_err(|error| error.kind);
    assert_eq!(refused(Header { version: 2, ..header(1) }), Err(ErrorKind::Unsupported));
    // An empty log may be of any version and anywhere.
    assert!(refused(Header { log_version: 1, log_bytes: 7, ..header(1) }).is_ok());
    let dirty = Header { log_id: Uuid::from_u128(3), ..header(1) };
    assert!(refused(dirty.clone()).is_ok());
    assert_eq!(refused(Header { log_version: 1, ..dirty.clone() }), Err(ErrorKind::Unsupported));
    assert_eq!(refused(Header { log_bytes: 2 << 30, ..dirty.clone() }), Err(ErrorKind::Unsupported));
    for (log_bytes, log_offset) in [(0, 1 << 20), (4096, 1 << 20), (1 << 20, 0), (1 << 20, 5000)] {
        assert_eq!(refused(Header { log_bytes, log_offset, ..dirty.clone() }), Err(ErrorKind::Corrupt));
    }
}

fn region(id: Uuid, offset_mib: u64, mib: u32) -> RegionEntry {
    RegionEntry { id, offset: offset_mib << 20, bytes: mib << 20, required: true }
}

#[test]
fn regions_are_found_and_what_is_required_and_unknown_is_named() {
    let unknown = Uuid::from_u128(0xabcd);
    let good = vec![region(RegionTable::BAT, 3, 2), region(RegionTable::METADATA, 2, 1)];
    let read = |entries: Vec<RegionEntry>| regions(&RegionTable { entries }, &header(1));
    let found = read(good.clone()).unwrap();
    assert_eq!((found.bat.offset, found.metadata.bytes, found.taken.len()), (3 << 20, 1 << 20, 4));
    let optional = RegionEntry { required: false, ..region(unknown, 9, 1) };
    assert_eq!(read([good.clone(), vec![optional]].concat()).unwrap().taken.len(), 5);
    let error = read([good.clone(), vec![region(unknown, 9, 1)]].concat()).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Unsupported);
    assert!(error.message.contains(&unknown.to_string()), "{error}");
    for bad in [
        vec![good[0].clone()],
        vec![good[1].clone()],
        [good.clone(), good.clone()].concat(),
        vec![good[0].clone(), region(RegionTable::METADATA, 4, 1)],
        vec![good[0].clone(), region(RegionTable::METADATA, 1, 1)],
        vec![good[0].clone(), region(RegionTable::METADATA, 0, 1)],
        vec![good[0].clone(), region(RegionTable::METADATA, 9, 0)],
        vec![good[0].clone(), RegionEntry { offset: 12345, ..good[1].clone() }],
        vec![good[0].clone(), RegionEntry { offset: u64::MAX - MIB + 1, ..good[1].clone() }],
    ] {
        assert_eq!(read(bad.clone()).unwrap_err().kind, ErrorKind::Corrupt, "{bad:?}");
    }
}

#[test]
fn items_are_found_and_what_is_required_and_unknown_is_named() {
    let entry = |id, offset, bytes| MetadataEntry {
        id,
        offset,
        bytes,
        is_user: false,
        is_virtual_disk: false,
        required: true,
    };
    let good = vec![
        entry(item::FILE_PARAMETERS, 65536, 8),
        entry(item::VIRTUAL_DISK_SIZE, 65544, 8),
        entry(item::LOGICAL_SECTOR_SIZE, 65552, 4),
    ];
    let place = Extent { offset: 2 << 20, bytes: 1 << 20 };
    let read = |entries: Vec<MetadataEntry>| items(&MetadataTable { entries }, place);
    let found = read(good.clone()).unwrap();
    assert_eq!(found.virtual_disk_size, Extent { offset: (2 << 20) + 65544, bytes: 8 });
    assert_eq!(found.parent_locator, None);
    let with = |more: MetadataEntry| read([good.clone(), vec![more]].concat());
    let unknown = entry(Uuid::from_u128(77), 70000, 4);
    let error = with(unknown.clone()).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Unsupported);
    assert!(error.message.contains(&unknown.id.to_string()), "{error}");
    assert!(with(MetadataEntry { required: false, ..unknown }).is_ok());
    // A user's item may have the same id.
    let users = MetadataEntry { is_user: true, required: false, ..good[0].clone() };
    assert_eq!(with(users).unwrap(), found);
    for bad in [
        good[0].clone(),
        entry(item::PARENT_LOCATOR, 100, 8),
        entry(item::PARENT_LOCATOR, (1 << 20) - 4, 8),
        entry(item::PARENT_LOCATOR, u32::MAX, u32::MAX),
    ] {
        assert_eq!(with(bad.clone()).unwrap_err().kind, ErrorKind::Corrupt, "{bad:?}");
    }
    for missing in 0..good.len() {
        let mut fewer = good.clone();
        fewer.remove(missing);
        assert_eq!(read(fewer).unwrap_err().kind, ErrorKind::Corrupt);
    }
}

fn locator(pairs: &[(&str, &str)]) -> ParentLocator {
    let pairs = pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    ParentLocator { kind: ParentLocator::VHDX, pairs }
}

const CHILD: FileParameters =
    FileParameters { block_bytes: 1 << 20, leave_allocated: false, has_parent: true };

#[test]
fn a_childs_words_about_its_parent_are_taken_in_order() {
    let (a, b) = (Uuid::from_u128(1), Uuid::from_u128(2));
    let both = locator(&[
        ("parent_linkage2", &ParentLocator::braced(b)),
        ("parent_linkage", &ParentLocator::braced(a)),
        ("absolute_win32_path", "\\\\?\\d:\\disks\\base.vhdx"),
        ("volume_path", "\\\\?\\Volume{26A21BDA-A627-11D7-9931-806E6F6E6963}\\disks\\base.vhdx"),
        ("relative_path", "..\\disks\\base.vhdx"),
    ]);
    let found = linkage(CHILD, Some(&both)).unwrap().unwrap();
    assert_eq!(found.parent_ids, [a, b]);
    let (relative, beside) = ("../disks/base.vhdx".to_owned(), "base.vhdx".to_owned());
    assert_eq!(found.paths, [ParentPath::Relative(relative), ParentPath::Beside(beside)]);
    assert_eq!(linkage(FileParameters { has_parent: false, ..CHILD }, Some(&both)).unwrap(), None);
    let kind = |result: Result<Option<Linkage>, WireError>| result.map_err(|error| error.kind);
    assert_eq!(kind(linkage(CHILD, None)), Err(ErrorKind::Corrupt));
    assert_eq!(kind(linkage(CHILD, Some(&locator(&[("relative_path", "x")])))), Err(ErrorKind::Corrupt));
    let id = ParentLocator::braced(a);
    assert_eq!(kind(linkage(CHILD, Some(&locator(&[("parent_linkage", &id)])))), Err(ErrorKind::Corrupt));
    let san = ParentLocator { kind: Uuid::from_u128(5), ..both };
    assert_eq!(kind(linkage(CHILD, Some(&san))), Err(ErrorKind::Unsupported));
}

proptest! {
    /// A link holds exactly if the parent's id is among the remembered and the disks are alike; a refusal names files
    /// and ids.
    #[test]
    fn a_link_holds_exactly_if_the_parent_is_the_remembered_one(
        remembered in proptest::collection::vec(0u128..4, 1..3), parent in 0u128..4,
        sizes in (1u64..3, 1u64..3), sectors in (any::<bool>(), any::<bool>())
    ) {
        let geometry = |size: u64, large| {
            Geometry::new(size * 4096, 1 << 20, if large { 4096 } else { 512 }, true).unwrap()
        };
        let (own, below) = (geometry(sizes.0, sectors.0), geometry(sizes.1, sectors.1));
        let remembered: Vec<Uuid> = remembered.into_iter().map(Uuid::from_u128).collect();
        let child = Member { file: "child.vhdx", data_write_id: Uuid::nil(), geometry: &own };
        let parent = Member { file: "base.vhdx", data_write_id: Uuid::from_u128(parent), geometry: &below };
        let same = remembered.contains(&parent.data_write_id);
        match check_link(child, &remembered, parent) {
            Ok(()) => prop_assert!(same && sizes.0 == sizes.1 && sectors.0 == sectors.1),
            Err(error) => {
                prop_assert!(!same || sizes.0 != sizes.1 || sectors.0 != sectors.1);
                prop_assert_eq!(error.kind, ErrorKind::Refused);
                prop_assert!(error.message.contains("child.vhdx") && error.message.contains("base.vhdx"));
                if !same {
                    for id in remembered.iter().chain([&parent.data_write_id]) {
                        prop_assert!(error.message.contains(&id.to_string()));
                    }
                }
            }
        }
    }
}
