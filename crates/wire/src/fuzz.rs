//! Every decoder of this crate, fed with bytes of strangers (`whimbrel_fuzz`).
//!
//! Records with a checksum get a second chance: the input's checksum is put right, so that what lies behind it is
//! reached too. Where a format has one way to write a value, what was read must be written back as it was.

use serde::Serialize;
use serde::de::DeserializeOwned;
use whimbrel_fuzz::fuzz;

use crate::peer::memory;
use crate::peer::{self, FrameHeader, HEADER_LEN, block, cluster, migrate};
use crate::record::image::{
    Directory, Entry, IndexHeader, ManifestHeader, PackEntry, PackTrailer, decode_pack_index,
    encode_pack_tail,
};
use crate::record::layer::{header, log, runs, ship};
use crate::record::vhdx;
use crate::{api, meta, nbd, size};

/// Reads a value of type `T`; one that can be read can be written, and reads back as itself.
fn json<T: DeserializeOwned + Serialize>(bytes: &[u8]) {
    let Ok(value) = serde_json::from_slice::<T>(bytes) else { return };
    let text = serde_json::to_vec(&value).expect("what was read can be written");
    let again: T = serde_json::from_slice(&text).unwrap_or_else(|error| {
        panic!(
            "{error}: read {:?}, wrote {:?}",
            String::from_utf8_lossy(bytes),
            String::from_utf8_lossy(&text)
        )
    });
    assert_eq!(text, serde_json::to_vec(&again).expect("what was read can be written"));
}

/// The bytes with the CRC-32C of `over` at `at`.
fn with_crc(bytes: &[u8], at: usize, over: impl Fn(&[u8]) -> u32) -> Vec<u8> {
    let mut fixed = bytes.to_vec();
    let crc = over(&fixed);
    if let Some(place) = fixed.get_mut(at..at + 4) {
        place.copy_from_slice(&crc.to_le_bytes());
    }
    fixed
}

/// The CRC of everything but itself, which stands at 12..16.
fn but_itself(bytes: &[u8]) -> u32 {
    let (before, after) = bytes.split_at(12.min(bytes.len()));
    crc32c::crc32c_append(crc32c::crc32c(before), after.get(4..).unwrap_or_default())
}

fn rest(bytes: &[u8], from: usize) -> &[u8] {
    bytes.get(from..).unwrap_or_default()
}

/// A chunk of a layer with a frame of each kind.
fn chunk() -> Vec<u8> {
    let mut chunk = ship::ChunkBuilder::with_capacity(0);
    chunk.data(8192, &[7; 4096]);
    chunk.zero(1 << 30, 1 << 20);
    chunk.finish(crate::DiskId(uuid::Uuid::from_u128(5)), log::LogPoint::START, log::LogPoint::START)
}

/// Puts every checksum of a chunk right.
fn mended_chunk(bytes: &[u8]) -> Vec<u8> {
    let mut fixed =
        with_crc(bytes, 12, |b| crc32c::crc32c(b.get(16..ship::CHUNK_HEAD_LEN).unwrap_or_default()));
    let mut at = ship::CHUNK_HEAD_LEN;
    while let Some(head) = fixed.get(at..at + ship::FRAME_HEAD_LEN) {
        let length = head[16..24].try_into().map_or(0, u64::from_le_bytes).min(1 << 20) as usize;
        let payload = at + ship::FRAME_HEAD_LEN;
        let end = payload.saturating_add(if head[24] == 1 { length } else { 0 }).min(fixed.len());
        let crc = crc32c::crc32c(fixed.get(payload..end).unwrap_or_default());
        fixed[at + 4..at + 8].copy_from_slice(&crc.to_le_bytes());
        let crc = crc32c::crc32c(&fixed[at + 4..at + ship::FRAME_HEAD_LEN]);
        fixed[at..at + 4].copy_from_slice(&crc.to_le_bytes());
        at = end.max(payload);
    }
    fixed
}

fn control_frame() -> Vec<u8> {
    let mut out = Vec::new();
    memory::Control::BytesEnd.put(&mut out, 3).expect("a short message");
    out
}

fn layer_header() -> header::Header {
    header::Header {
        generation: 3,
        features_required: 0,
        features_ignorable: 1,
        disk_id: crate::DiskId(uuid::Uuid::from_u128(1)),
        data_id: crate::DataId(uuid::Uuid::from_u128(2)),
        parent: header::Parent::Image(crate::ImageId([3; 32])),
        second_linkage: Some(crate::DataId(uuid::Uuid::from_u128(5))),
        sector_bytes: 512,
        size_bytes: 1 << 30,
        epoch: crate::Epoch(4),
        salt: 5,
        session: 6,
        segment_blocks: 7,
        first_segment: 0,
        state: header::State::Receiving(ship::ShipPosition::START),
        clean_end: Some(log::LogPoint::START),
        checkpoint: None,
    }
}

fn vhdx_header() -> vhdx::Header {
    vhdx::Header {
        sequence: 1,
        file_write_id: uuid::Uuid::from_u128(1),
        data_write_id: uuid::Uuid::from_u128(2),
        log_id: uuid::Uuid::from_u128(3),
        log_version: 0,
        version: 1,
        log_bytes: 1 << 20,
        log_offset: 1 << 20,
    }
}

fn vhdx_entry() -> vhdx::EntryHeader {
    vhdx::EntryHeader {
        checksum: 0,
        bytes: 0,
        tail: 0,
        sequence: 5,
        descriptors: 0,
        log_id: uuid::Uuid::from_u128(3),
        flushed_file_offset: 0,
        last_file_offset: 0,
    }
}

fuzz! {
    /// The head of a frame between hosts, and what it carries.
    fn frames(bytes) seeds [
        FrameHeader { json_len: 5, payload_len: 0, request: 7, kind: peer::FrameKind::Call }.encode(),
        br#"{"versions":[1],"program":"p","open":{"service":"s","params":{}}}"#,
        br#"{"method":"image.block","params":{"image":"","index":1}}"#,
        br#"{"version":1,"program":"p"}"#,
        br#"{"kind":"not_found","message":"m","hint":"h"}"#,
    ] {
        if let Some(header) = bytes.first_chunk::<HEADER_LEN>()
            && let Ok(read) = FrameHeader::decode(header)
        {
            assert_eq!(read.encode(), *header);
        }
        json::<peer::Hello>(bytes);
        json::<peer::Welcome>(bytes);
        json::<peer::CallHead>(bytes);
        json::<crate::WireError>(bytes);
    }

    /// Calls about images, the cluster, the metadata store and moves.
    fn calls(bytes) seeds [
        br#"{"image":"1111111111111111111111111111111111111111111111111111111111111111","offset":1,"length":2}"#,
        br#"{"image":"1111111111111111111111111111111111111111111111111111111111111111","blocks":12}"#,
        br#"{"image":"1111111111111111111111111111111111111111111111111111111111111111","here":[{"first":1,"count":2}],"gone":[],"leaves":false}"#,
        br#"{"image":"1111111111111111111111111111111111111111111111111111111111111111","index":5,"on_demand":true}"#,
        br#"{"prefix":"vms/","compares":[],"ops":[{"put":"k","bytes":3}]}"#,
        br#"{"token":"t","host":"h","csr":"x"}"#,
    ] {
        json::<block::ManifestAsk>(bytes);
        json::<block::ManifestReply>(bytes);
        json::<block::BitmapHello>(bytes);
        json::<block::Have>(bytes);
        json::<block::BlockAsk>(bytes);
        json::<block::BlockReply>(bytes);
        json::<cluster::JoinRequest>(bytes);
        json::<cluster::JoinAnswer>(bytes);
        json::<cluster::RenewAnswer>(bytes);
        json::<peer::meta::ReadRequest>(bytes);
        json::<peer::meta::Items>(bytes);
        json::<peer::meta::TxnRequest>(bytes);
        json::<peer::meta::TxnAnswer>(bytes);
        json::<peer::meta::ResolveRequest>(bytes);
        json::<peer::meta::WatchRequest>(bytes);
        json::<peer::meta::WatchMessage>(bytes);
        json::<migrate::Offer>(bytes);
        json::<migrate::Control<migrate::ToTarget>>(bytes);
        json::<migrate::Control<migrate::ToSource>>(bytes);
        json::<migrate::JournalEntry>(bytes);
        json::<migrate::DataOpen>(bytes);
        json::<migrate::LayerHead>(bytes);
        json::<migrate::StateHead>(bytes);
    }

    /// What other hosts say they have: the number of blocks, then the bitmap.
    fn bitmaps(bytes) seeds [[70, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0x20], [0; 4]] {
        let Some((blocks, map)) = bytes.split_first_chunk::<4>() else { return };
        let blocks = u64::from(u32::from_le_bytes(*blocks) % (1 << 20));
        let Ok(read) = block::Bitmap::from_bytes(blocks, map) else { return };
        assert_eq!(read.iter().count() as u64, read.count());
        assert!(read.iter().all(|block| block < blocks && read.has(block)));
        assert_eq!(block::Bitmap::from_bytes(blocks, &read.to_bytes()).expect("it was read before"), read);
    }

    /// Frames of a moving memory: pages, control messages, pieces of QEMU's stream.
    fn page_stream(bytes) seeds [
        control_frame(),
        { let mut out = Vec::new(); memory::put_chunk(&mut out, memory::Encoding::Raw, b"abc", b"abc"); out },
        {
            let mut out = Vec::new();
            let runs = [memory::Run { first_page: 3, pages: 2 }];
            memory::put_pages(&mut out, 5, 1, memory::Encoding::Zero, &runs, &[0; 8192], &[]);
            out
        },
        {
            let (mut out, mut references) = (Vec::new(), Vec::new());
            let reference = memory::Reference { object: 1, index: 2, hash: [3; memory::HASH_BYTES] };
            reference.put(&mut references);
            let runs = [memory::Run { first_page: 3, pages: 1 }];
            memory::put_pages(&mut out, 5, 1, memory::Encoding::SamePages, &runs, &references, &references);
            out
        },
        {
            let mut out = Vec::new();
            let runs = [memory::Run { first_page: 3, pages: 1 }];
            memory::put_pages(&mut out, 5, 1, memory::Encoding::Changes, &runs, &[0; 4096], &[5; 90]);
            out
        },
        {
            let mut out = Vec::new();
            let missing = vec![memory::Missing(0, 5, 2)];
            let (counts, misses) = (memory::RoundCounts::default(), memory::Misses { delta: 2, ..Default::default() });
            let done = memory::Control::RoundDone { counts, decode_ms: 1, missing, misses };
            done.put(&mut out, 3).expect("a short message");
            out
        },
    ] {
        let Some((head, body)) = bytes.split_first_chunk() else { return };
        let Ok(header) = memory::Header::parse(head) else { return };
        assert!(header.body_len <= memory::BODY_BYTES_MAX);
        // A body of its own length, as a reader takes it from the stream.
        let mut body = body.to_vec();
        let body_len = header.body_len.min(1 << 16);
        body.resize(body_len, 0);
        let header = memory::Header { body_len, ..header };
        let mended = memory::Header { check: header.check_of(&[], &body), ..header };
        for header in [header, mended] {
            let _ = memory::Control::parse(&header, &body);
            if let Ok(chunk) = memory::Chunk::parse(&header, &body) {
                let _ = chunk.verify(chunk.payload);
                assert!(chunk.raw_bytes <= memory::CHUNK_BYTES_MAX);
            }
            if let Ok(pages) = memory::Pages::parse(&header, &body, &[1000, 70_000]) {
                let limit = if pages.block == 0 { 1000 } else { 70_000 };
                assert!(pages.runs().all(|run| u64::from(run.first_page) + u64::from(run.pages) <= limit));
                let _ = pages.verify(pages.payload);
                if matches!(pages.encoding, memory::Encoding::SamePages | memory::Encoding::DiskBlocks) {
                    assert_eq!(pages.references().count() as u64, pages.pages());
                    assert_eq!(pages.page_numbers().count() as u64, pages.pages());
                }
            }
        }
    }

    /// An image's manifest, its parts, packs and the index of known blocks.
    fn image_records(bytes) seeds [
        ManifestHeader { size_bytes: 1 << 30, packs: 2, entries: 10, data_bytes: 1 << 20 }.encode(),
        IndexHeader { packs: 1, entries: 2 }.encode(),
        encode_pack_tail(&[PackEntry {
            hash: crate::BlockHash([1; 32]),
            offset: 0,
            length: 100,
            encoding: crate::record::image::Encoding::Zstd,
        }]),
        br#"{"image":"a:b","id":"1111111111111111111111111111111111111111111111111111111111111111","size_bytes":1,"stored_bytes":1,"published_s":1}"#,
    ] {
        if let Ok(header) = ManifestHeader::decode(bytes) {
            // Every place that the header lets be computed fits into a number.
            assert!(header.directory_at(header.groups()) <= header.file_bytes());
            assert!(header.blocks() <= header.groups() * 64);
        }
        let _ = Directory::decode(bytes).map(|item| (0..64).map(|block| item.entry_of(block)).max());
        let _ = Entry::decode(bytes, 5);
        let _ = IndexHeader::decode(bytes).map(|header| header.file_bytes());
        if let Ok(trailer) = PackTrailer::decode(bytes) {
            let index = rest(bytes, 64);
            let mended = PackTrailer {
                entries: u32::try_from(index.len() / 48).unwrap_or(0),
                index_hash: *blake3::hash(&index[..index.len() - index.len() % 48]).as_bytes(),
            };
            let whole = &index[..index.len() - index.len() % 48];
            if let Ok(entries) = decode_pack_index(whole, &mended, 1 << 20) {
                assert!(entries.iter().all(|e| u64::from(e.offset) + u64::from(e.length) <= 1 << 20));
            }
            let _ = decode_pack_index(index, &trailer, 1 << 20);
        }
        json::<crate::record::image::ImageName>(bytes);
    }

    /// A layer's headers, its log, its extent map and its chunks on the way.
    fn layer_records(bytes) seeds [
        layer_header().encode().as_slice(),
        chunk(),
        runs::encode([runs::Run { start: 3, blocks: 4, kind: runs::RunKind::Data(5) }]),
        runs::encode([runs::Run { start: 3, blocks: 4, kind: runs::RunKind::Zero }]),
        log::Entry {
            chain: 1,
            seq: 2,
            offset_bytes: 4096,
            length_bytes: 8192,
            kind: log::EntryKind::Data { block: 3, payload_crc: 4 },
        }.encode().0,
        log::GroupHead { chain: 1, first_seq: 2, salt: 3, epoch: crate::Epoch(4), durable_seq: 5, block: 6 }.encode().0,
        log::SegmentHead {
            disk_id: crate::DiskId(uuid::Uuid::from_u128(1)),
            salt: 2,
            segment: 3,
            first_seq: 4,
            chain: 5,
            session: 6,
            epoch: crate::Epoch(7),
        }.encode().as_slice(),
    ] {
        for bytes in [bytes.to_vec(), with_crc(bytes, 12, but_itself)] {
            if let Ok(header) = header::Header::decode(&bytes) {
                let again = header::Header::decode(header.encode().as_slice()).expect("it was read before");
                assert_eq!(again, header);
            }
            let _ = log::SegmentHead::decode(&bytes);
        }
        let entry_len = bytes.len().min(48);
        for bytes in [bytes.to_vec(), with_crc(&bytes[..entry_len], 0, |b| crc32c::crc32c(rest(b, 4)))] {
            if let Some((entry, _)) = log::Entry::decode(&bytes) {
                assert_eq!(log::Entry::decode(&entry.encode().0).expect("it was read before").0, entry);
                let _ = entry.payload_blocks();
            }
            let _ = log::GroupHead::decode(&bytes);
        }
        for bytes in [bytes.to_vec(), with_crc(bytes, 12, |b| crc32c::crc32c(rest(b, 24)))] {
            if let Ok(all) = runs::decode(&bytes) {
                assert_eq!(runs::encode(all), bytes);
            }
        }
        let _ = ship::ShipPosition::decode(bytes);
        for bytes in [bytes.to_vec(), mended_chunk(bytes)] {
            if let Ok(chunk) = ship::ShipChunk::decode(&bytes) {
                let whole = |f: &ship::ShipFrame<'_>| f.payload.is_none_or(|p| p.len() as u64 == f.length_bytes);
                assert!(chunk.frames.iter().all(whole));
            }
        }
    }

    /// Records of VHDX files, their checksums put right.
    fn vhdx_records(bytes) seeds [
        vhdx_header().encode(),
        vhdx::RegionTable { entries: vec![vhdx::RegionEntry {
            id: vhdx::RegionTable::BAT, offset: 3 << 20, bytes: 1 << 20, required: true,
        }] }.encode().get(..100).unwrap_or_default(),
        vhdx::MetadataTable { entries: vec![vhdx::MetadataEntry {
            id: vhdx::metadata::item::FILE_PARAMETERS, offset: 65536, bytes: 8, is_user: false, is_virtual_disk: false,
            required: true,
        }] }.encode().get(..100).unwrap_or_default(),
        vhdx::ParentLocator {
            kind: vhdx::ParentLocator::VHDX,
            pairs: vec![
                (vhdx::ParentLocator::LINKAGE.into(), vhdx::ParentLocator::braced(uuid::Uuid::from_u128(1))),
                (vhdx::ParentLocator::RELATIVE_PATH.into(), ".\\base.vhdx".into()),
            ],
        }.encode(),
        vhdx::log::encode_entry(&vhdx_entry(), &[vhdx::log::Change::Zero(0, 4096)]),
    ] {
        let mut table = bytes.to_vec();
        table.resize(vhdx::TABLE_LEN, 0);
        for mend in [false, true] {
            let crc = |b: &[u8]| crc32c::crc32c_append(crc32c::crc32c_append(crc32c::crc32c(&b[..4]), &[0; 4]), &b[8..]);
            let header = if mend { with_crc(&table[..4096], 4, crc) } else { table[..4096].to_vec() };
            if let Ok(read) = vhdx::Header::decode(&header) {
                assert_eq!(vhdx::Header::decode(&read.encode()).expect("it was read before"), read);
            }
            let regions = if mend { with_crc(&table, 4, crc) } else { table.clone() };
            if let Ok(read) = vhdx::RegionTable::decode(&regions) {
                assert_eq!(vhdx::RegionTable::decode(&read.encode()).expect("it was read before"), read);
            }
        }
        if let Ok(read) = vhdx::MetadataTable::decode(&table) {
            assert_eq!(vhdx::MetadataTable::decode(&read.encode()).expect("it was read before"), read);
        }
        if let Ok(read) = vhdx::ParentLocator::decode(bytes) {
            assert_eq!(vhdx::ParentLocator::decode(&read.encode()).expect("it was read before"), read);
            let _ = read.guid(vhdx::ParentLocator::LINKAGE);
        }
        let _ = vhdx::FileParameters::decode(bytes);
        if let Ok(header) = vhdx::EntryHeader::decode(bytes) {
            assert!(header.descriptor_sectors() * 4096 <= u64::from(header.bytes));
            for number in 0..header.descriptor_sectors().min(3) {
                for descriptor in header.descriptors_in(number, rest(bytes, number as usize * 4096)) {
                    let _ = vhdx::Descriptor::decode(descriptor, header.sequence);
                }
            }
            let _ = vhdx::log::check_data_sector(bytes, header.sequence);
        }
    }

    /// What people and scripts send to the API.
    fn api_requests(bytes) seeds [
        br#"{"name":"v","spec":{"volumes":["v"],"memory_bytes":1073741824,"vcpus":2,"net":[{"bridge":"br0"}],"qemu_args":["-a"]}}"#,
        br#"{"to":"h","downtime_limit_ms":100,"bandwidth_bytes_s":1,"post_copy":"auto","disk":"copy","mode":"a","verify":true}"#,
        br#"{"image":"a:b","file":"/f","format":"raw","store_url":"/s"}"#,
        br#"{"name":"v","image":"a:b","size_bytes":1}"#,
        br#"{"address":"1.2.3.4:5","token":"t"}"#,
        br#"{"name":"c","default_store_url":"/s"}"#,
        br#"{"id":"00000000-0000-0000-0000-000000000000","kind":"migrate","object":"vm v","phase":"p","state":"running"}"#,
    ] {
        json::<api::VmRun>(bytes);
        json::<api::VmAdopt>(bytes);
        json::<api::VmMigrate>(bytes);
        json::<api::VmStop>(bytes);
        json::<api::VmRecover>(bytes);
        json::<api::ImagePublish>(bytes);
        json::<api::ImageCheck>(bytes);
        json::<api::VolumeCreate>(bytes);
        json::<api::VolumeAttach>(bytes);
        json::<api::VolumeResize>(bytes);
        json::<api::VolumeImport>(bytes);
        json::<api::Export>(bytes);
        json::<api::HostJoin>(bytes);
        json::<api::HostDrain>(bytes);
        json::<api::ClusterInit>(bytes);
        json::<api::TokenMake>(bytes);
        json::<api::Task>(bytes);
        json::<api::TaskLimit>(bytes);
        json::<api::Vm>(bytes);
        json::<api::Image>(bytes);
        json::<api::Volume>(bytes);
        json::<api::Host>(bytes);
    }

    /// What a metadata store holds.
    fn metadata(bytes) seeds [
        br#"{"name":"h","role":"host","addresses":["1.2.3.4:5"],"revoked":false,"domains":["d"]}"#,
        br#"{"image":"a:b","id":"1111111111111111111111111111111111111111111111111111111111111111","size_bytes":1,"stored_bytes":1,"store_url":"/s"}"#,
        br#"{"blocks":7}"#,
    ] {
        json::<meta::ClusterRecord>(bytes);
        json::<meta::HostRecord>(bytes);
        json::<meta::TokenRecord>(bytes);
        json::<meta::ImageRecord>(bytes);
        json::<meta::VolumeRecord>(bytes);
        json::<meta::VmRecord>(bytes);
        json::<meta::HoldsRecord>(bytes);
    }

    /// What an NBD client says: options, requests, their payloads. What can be read is written back as it was.
    fn nbd(bytes) seeds [
        [0, 0, 0, 1, b'd', 0, 1, 0, 3],
        [&[0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 15][..], b"base:allocation"].concat(),
        nbd::OptionHead { option: 7, length: 6 }.encode(),
        nbd::Request { flags: 1, command: nbd::Command::Write, cookie: 2, offset: 3, length: 4 }
            .encode(nbd::Headers::Compact),
        nbd::Request { flags: 0x20, command: nbd::Command::BlockStatus, cookie: 2, offset: 3, length: 12 }
            .encode(nbd::Headers::Extended),
        [0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1],
    ] {
        if let Some(query) = nbd::InfoQuery::decode(bytes) {
            assert_eq!(bytes.len(), 6 + query.name.len() + 2 * query.kinds.len());
        }
        if let Some(query) = nbd::MetaQuery::decode(bytes) {
            let lengths: usize = query.queries.iter().map(|query| 4 + query.len()).sum();
            assert_eq!(bytes.len(), 8 + query.name.len() + lengths);
        }
        if let Some(payload) = nbd::request::StatusPayload::decode(bytes) {
            assert_eq!(bytes.len(), 8 + 4 * payload.contexts.len());
        }
        if let Some(head) = bytes.first_chunk().and_then(nbd::OptionHead::decode) {
            assert_eq!(head.encode(), bytes[..nbd::OptionHead::BYTES]);
        }
        for headers in [nbd::Headers::Compact, nbd::Headers::Extended] {
            if let Some(request) = nbd::Request::decode(headers, bytes) {
                assert_eq!(request.encode(headers), bytes[..headers.bytes()]);
            }
        }
    }

    /// Names, identifiers, sizes, rates and durations, as people type them.
    fn words(bytes) seeds [
        b"a-name_1.2", b"image:tag", b"10G", b"1.5Ki", b"10Gbit", b"100ms", b"host", b"1h",
        b"00000000-0000-0000-0000-000000000000",
    ] {
        let Ok(text) = std::str::from_utf8(bytes) else { return };
        /// What was read is written the same way, and reads back.
        fn same<T: std::str::FromStr + std::fmt::Display + PartialEq>(text: &str) {
            if let Ok(value) = text.parse::<T>() {
                assert!(value.to_string().parse::<T>().is_ok_and(|again| again == value), "{text:?}");
            }
        }
        same::<crate::Name>(text);
        same::<crate::HostId>(text);
        same::<crate::ImageRef>(text);
        same::<crate::ImageId>(text);
        same::<crate::Role>(text);
        let _ = (size::parse_bytes(text), size::parse_rate_bytes_s(text), size::parse_ms(text));
        let _ = text.parse::<migrate::Step>();
    }
}
