//! Links on real sockets.

use super::proxy::{Mode, Proxy};
use super::*;
use crate::cluster::{Authority, HOST_LIFE_S, Subject};
use serde::{Deserialize, Serialize};
use std::sync::atomic::AtomicU64;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use whimbrel_wire::Name;

const SOON: Duration = Duration::from_secs(10);
const LOOPBACK: &str = "127.0.0.1:0";

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn authority() -> Authority {
    Authority::generate(&name("test")).unwrap()
}

fn links(authority: &Authority, role: Role, host: &str) -> Links {
    let credentials = authority.credentials(role, &name(host)).unwrap();
    Links::new(credentials, LinkOptions::default()).unwrap()
}

/// Two hosts, `b` listening with `router` and known to `a`.
struct Pair {
    authority: Authority,
    a: Links,
    b: Links,
    listening: Listening,
}

async fn pair(router: Router) -> Pair {
    let authority = authority();
    let a = links(&authority, Role::Host, "a");
    let b = links(&authority, Role::Host, "b");
    let listening = b.listen(LOOPBACK.parse().unwrap(), router).await.unwrap();
    a.set_addresses(&name("b"), vec![listening.address()]);
    Pair { authority, a, b, listening }
}

#[derive(Serialize, Deserialize)]
struct Number {
    value: u64,
}

/// Doubles a number, sends the payload back, and reports kinds of errors.
fn doubling() -> Router {
    Router::new()
        .call("host.double", |_, n: Number, payload| async move {
            if n.value == 13 {
                return Err(Error::new(ErrorKind::NoSpace, "double 13").hint("try 14"));
            }
            if n.value == 666 {
                panic!("a handler fails");
            }
            Ok((Number { value: n.value * 2 }, payload))
        })
        .call("host.hang", |_, _: (), _| async move {
            tokio::time::sleep(Duration::from_secs(600)).await;
            Ok(((), Bytes::new()))
        })
        .stream("migrate.echo", |_, n: Number, offer| async move {
            if n.value == 13 {
                return Err(Error::new(ErrorKind::Refused, "echo 13"));
            }
            let mut stream = offer.accept().await?;
            let mut bytes = vec![0; 64 << 10];
            loop {
                let got = stream.read(&mut bytes).await.context("read")?;
                if got == 0 {
                    return stream.shutdown().await.context("close");
                }
                stream.write_all(&bytes[..got]).await.context("write")?;
                stream.flush().await.context("flush")?;
            }
        })
        .stream("migrate.sink", |_, _: (), offer| async move {
            let mut stream = offer.accept().await?;
            let mut bytes = vec![0; 256 << 10];
            let mut total = 0;
            loop {
                let got = stream.read(&mut bytes).await.context("read")?;
                total += got as u64;
                if got == 0 {
                    break;
                }
            }
            stream.write_all(&total.to_le_bytes()).await.context("write")?;
            stream.shutdown().await.context("close")
        })
}

async fn double(links: &Links, value: u64) -> Result<u64> {
    let (n, _): (Number, _) =
        links.call(&name("b"), "host.double", &Number { value }, Bytes::new(), SOON).await?;
    Ok(n.value)
}

#[tokio::test]
async fn a_call_carries_parameters_payload_and_errors_with_their_kind() {
    let pair = pair(doubling()).await;
    let payload = Bytes::from(vec![7; 8 << 20]);
    let (n, back): (Number, _) =
        pair.a.call(&name("b"), "host.double", &Number { value: 21 }, payload.clone(), SOON).await.unwrap();
    assert_eq!((n.value, back), (42, payload));
    let error = double(&pair.a, 13).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    assert!(error.to_string().contains("host b") && error.to_string().contains("double 13"), "{error}");
    assert_eq!(error.to_wire().hint.as_deref(), Some("try 14"));
    assert_eq!(double(&pair.a, 666).await.unwrap_err().kind(), ErrorKind::Internal);
    assert_eq!(double(&pair.a, 4).await.unwrap(), 8, "the connection survives a handler that failed");
    let wrong: Result<((), _)> = pair.a.call(&name("b"), "host.double", &"text", Bytes::new(), SOON).await;
    assert_eq!(wrong.unwrap_err().kind(), ErrorKind::InvalidInput);
    let unknown: Result<((), _)> = pair.a.call(&name("b"), "host.nothing", &(), Bytes::new(), SOON).await;
    assert_eq!(unknown.unwrap_err().kind(), ErrorKind::Unsupported);
    let too_long = Bytes::from(vec![0; (8 << 20) + 1]);
    let long: Result<((), _)> = pair.a.call(&name("b"), "host.double", &(), too_long, SOON).await;
    assert_eq!(long.unwrap_err().kind(), ErrorKind::InvalidInput);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_calls_run_at_once_over_one_connection() {
    let running = Arc::new((AtomicU64::new(0), AtomicU64::new(0)));
    let seen = running.clone();
    let router = Router::new().call("host.double", move |_, n: Number, payload| {
        let running = running.clone();
        async move {
            let now = running.0.fetch_add(1, Ordering::SeqCst) + 1;
            running.1.fetch_max(now, Ordering::SeqCst);
            tokio::time::sleep(Duration::from_millis(20)).await;
            running.0.fetch_sub(1, Ordering::SeqCst);
            Ok((Number { value: n.value * 2 }, payload))
        }
    });
    let pair = pair(router).await;
    let begun = std::time::Instant::now();
    let calls: Vec<_> = (0..1000u64)
        .map(|value| {
            let links = pair.a.clone();
            tokio::spawn(async move {
                let payload = Bytes::from(vec![value as u8; 1000]);
                let (n, back): (Number, _) = links
                    .call(&name("b"), "host.double", &Number { value }, payload.clone(), SOON)
                    .await
                    .unwrap();
                assert_eq!((n.value, back), (value * 2, payload));
            })
        })
        .collect();
    for call in calls {
        call.await.unwrap();
    }
    eprintln!("1000 calls in {:?}, {} at once", begun.elapsed(), seen.1.load(Ordering::SeqCst));
    assert!(seen.1.load(Ordering::SeqCst) > 100, "calls do not wait for each other");
}

#[tokio::test]
async fn a_stream_carries_bytes_both_ways_and_ends() {
    let pair = pair(doubling()).await;
    let mut stream = pair.a.stream(&name("b"), "migrate.echo", &Number { value: 1 }, SOON).await.unwrap();
    assert_eq!(stream.peer().host, name("b"));
    stream.write_all(b"whimbrel").await.unwrap();
    stream.flush().await.unwrap();
    let mut back = [0; 8];
    stream.read_exact(&mut back).await.unwrap();
    assert_eq!(&back, b"whimbrel");
    stream.shutdown().await.unwrap();
    assert_eq!(stream.read(&mut back).await.unwrap(), 0);
    assert!(stream.sent_bytes() > 8 && stream.received_bytes() > 8);
    let refused = pair.a.stream(&name("b"), "migrate.echo", &Number { value: 13 }, SOON).await;
    let error = refused.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert!(error.to_string().contains("echo 13"), "{error}");
    let unknown = pair.a.stream(&name("b"), "migrate.nothing", &(), SOON).await;
    assert_eq!(unknown.unwrap_err().kind(), ErrorKind::Unsupported);
}

#[tokio::test]
async fn a_role_that_may_not_call_is_denied() {
    let pair = pair(doubling()).await;
    for role in [Role::Operator, Role::Reader, Role::Guest] {
        let other = links(&pair.authority, role, "o");
        other.set_addresses(&name("b"), vec![pair.listening.address()]);
        assert_eq!(double(&other, 1).await.unwrap_err().kind(), ErrorKind::Denied, "{role}");
        let stream = other.stream(&name("b"), "migrate.echo", &Number { value: 1 }, SOON).await;
        assert_eq!(stream.unwrap_err().kind(), ErrorKind::Denied, "{role}");
    }
}

#[tokio::test]
async fn a_stranger_gets_nothing() {
    let pair = pair(doubling()).await;
    // A certificate of another authority, in either direction.
    let stranger = links(&authority(), Role::Host, "a");
    stranger.set_addresses(&name("b"), vec![pair.listening.address()]);
    assert_eq!(double(&stranger, 1).await.unwrap_err().kind(), ErrorKind::Denied);
    // No certificate: the join configuration, asked for the peer protocol and for joining.
    let authority_print = fingerprint(pair.a.credentials().authority());
    for alpn in [&b"whimbrel"[..], b"http/1.1", b"whimbrel-join"] {
        let mut config = (*tls::join_client(authority_print).unwrap()).clone();
        config.alpn_protocols = vec![alpn.to_vec()];
        let tcp = TcpStream::connect(pair.listening.address()).await.unwrap();
        let server = rustls::pki_types::ServerName::from(pair.listening.address().ip());
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        let mut bytes = Vec::new();
        if let Ok(mut tls) = connector.connect(server, tcp).await {
            let _ = tls.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").await;
            let _ = tls.read_to_end(&mut bytes).await;
        }
        assert!(bytes.is_empty(), "{alpn:?}: {bytes:?}");
    }
    // Not even TLS.
    let mut tcp = TcpStream::connect(pair.listening.address()).await.unwrap();
    tcp.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let mut bytes = Vec::new();
    let _ = tcp.read_to_end(&mut bytes).await;
    assert!(!String::from_utf8_lossy(&bytes).contains("HTTP"), "{bytes:?}");
    assert_eq!(double(&pair.a, 1).await.unwrap(), 2, "members are served meanwhile");
}

#[tokio::test]
async fn the_remote_api_gets_the_connection_and_who_it_is() {
    let router = doubling().http(|mut stream: PeerStream| async move {
        let mut request = [0; 18];
        stream.read_exact(&mut request).await.unwrap();
        let who = stream.peer().to_string();
        stream.write_all(who.as_bytes()).await.unwrap();
        stream.shutdown().await.unwrap();
    });
    let pair = pair(router).await;
    for role in Role::ALL {
        let caller = links(&pair.authority, role, "x");
        let mut api = connect_api(&caller, pair.listening.address()).await.unwrap();
        api.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        api.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer, format!("{role} x"));
    }
    let stranger = links(&authority(), Role::Operator, "x");
    assert_eq!(connect_api(&stranger, pair.listening.address()).await.unwrap_err().kind(), ErrorKind::Denied);
}

/// Prints how fast blocks of 128 KiB are fetched, 16 at once; the bound is far below any machine of interest.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocks_are_fetched_fast_over_calls() {
    let block = Bytes::from(vec![0x5a; 128 << 10]);
    let served = block.clone();
    let router = Router::new().call("image.block", move |_, _: Number, _| {
        let block = served.clone();
        async move { Ok(((), block)) }
    });
    let pair = pair(router).await;
    let begun = std::time::Instant::now();
    let mut fetchers = tokio::task::JoinSet::new();
    for _ in 0..16 {
        let (links, block) = (pair.a.clone(), block.clone());
        fetchers.spawn(async move {
            for value in 0..128 {
                let ((), got): ((), _) = links
                    .call(&name("b"), "image.block", &Number { value }, Bytes::new(), SOON)
                    .await
                    .unwrap();
                assert!(got == block);
            }
        });
    }
    fetchers.join_all().await;
    let rate = (16 * 128 * block.len()) as f64 / begun.elapsed().as_secs_f64() / 1e9;
    eprintln!("blocks over calls: {rate:.2} GB/s");
    assert!(rate > 0.01);
    let mut one = Duration::ZERO;
    for value in 0..50 {
        let begun = std::time::Instant::now();
        let _: ((), _) =
            pair.a.call(&name("b"), "image.block", &Number { value }, Bytes::new(), SOON).await.unwrap();
        one += begun.elapsed();
    }
    eprintln!("one block at a time: {:?} each", one / 50);
}

#[tokio::test]
async fn a_host_that_answers_under_another_name_is_not_believed() {
    let pair = pair(doubling()).await;
    pair.a.set_addresses(&name("c"), vec![pair.listening.address()]);
    let result: Result<((), _)> = pair.a.call(&name("c"), "host.double", &(), Bytes::new(), SOON).await;
    assert_eq!(result.unwrap_err().kind(), ErrorKind::Denied);
}

#[tokio::test]
async fn an_ended_certificate_is_refused() {
    let authority = authority();
    let subject = Subject { role: Role::Host, name: name("a"), generation: 1 };
    let (certificate, key) = authority.issue(&subject, 0).unwrap();
    let old = Credentials::from_pem(authority.certificate_pem(), &certificate, &key).unwrap();
    let a = Links::new(old, LinkOptions::default()).unwrap();
    let b = links(&authority, Role::Host, "b");
    let listening = b.listen(LOOPBACK.parse().unwrap(), doubling()).await.unwrap();
    a.set_addresses(&name("b"), vec![listening.address()]);
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    assert_eq!(double(&a, 1).await.unwrap_err().kind(), ErrorKind::Denied);
}

#[tokio::test]
async fn a_removed_host_is_cut_off_at_once_whatever_it_is_doing() {
    let pair = pair(doubling()).await;
    let mut stream = pair.a.stream(&name("b"), "migrate.echo", &Number { value: 1 }, SOON).await.unwrap();
    assert_eq!(double(&pair.a, 1).await.unwrap(), 2);
    let links = pair.a.clone();
    let hanging =
        tokio::spawn(
            async move { links.call::<(), ()>(&name("b"), "host.hang", &(), Bytes::new(), SOON).await },
        );
    tokio::time::sleep(Duration::from_millis(100)).await;
    let begun = std::time::Instant::now();
    pair.b.refuse(&name("a"), u64::MAX);
    assert_eq!(hanging.await.unwrap().unwrap_err().kind(), ErrorKind::Unknown);
    let mut bytes = [0; 1];
    assert!(matches!(stream.read(&mut bytes).await, Ok(0) | Err(_)));
    assert!(begun.elapsed() < Duration::from_millis(500), "{:?}", begun.elapsed());
    assert!(double(&pair.a, 1).await.is_err());
    // Joined again, it has a certificate of the next generation.
    pair.b.refuse(&name("a"), 2);
    assert!(double(&pair.a, 1).await.is_err());
    let subject = Subject { role: Role::Host, name: name("a"), generation: 2 };
    let (certificate, key) = pair.authority.issue(&subject, HOST_LIFE_S).unwrap();
    pair.a.credentials().replace(&certificate, &key).unwrap();
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    assert_eq!(double(&pair.a, 1).await.unwrap(), 2);
}

#[tokio::test]
async fn a_certificate_is_exchanged_under_traffic() {
    let pair = pair(doubling()).await;
    let before = pair.b.me().serial;
    let links = pair.a.clone();
    let traffic = tokio::spawn(async move {
        let mut stream = links.stream(&name("b"), "migrate.echo", &Number { value: 1 }, SOON).await.unwrap();
        for round in 100..140u64 {
            assert_eq!(double(&links, round).await.unwrap(), round * 2);
            stream.write_all(&round.to_le_bytes()).await.unwrap();
            stream.flush().await.unwrap();
            let mut back = [0; 8];
            stream.read_exact(&mut back).await.unwrap();
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    for links in [&pair.a, &pair.b] {
        let subject = Subject { role: Role::Host, name: links.me().host, generation: 1 };
        let (certificate, key) = pair.authority.issue(&subject, HOST_LIFE_S).unwrap();
        links.credentials().replace(&certificate, &key).unwrap();
    }
    traffic.await.unwrap();
    let stream = pair.a.stream(&name("b"), "migrate.echo", &Number { value: 1 }, SOON).await.unwrap();
    assert_ne!(stream.peer().serial, before, "new connections show the new certificate");
}

#[tokio::test]
async fn a_cut_in_the_middle_of_a_call_is_unknown_and_before_it_unavailable() {
    let pair = pair(doubling()).await;
    let proxy = Proxy::start(pair.listening.address()).await;
    pair.a.set_addresses(&name("b"), vec![proxy.address()]);
    assert_eq!(double(&pair.a, 1).await.unwrap(), 2);
    // The answer is lost: first until the deadline, then as the peer falls silent.
    proxy.set(Mode::LoseAnswers);
    let late: Result<(Number, _)> = pair
        .a
        .call(&name("b"), "host.double", &Number { value: 1 }, Bytes::new(), Duration::from_millis(300))
        .await;
    assert_eq!(late.err().unwrap().kind(), ErrorKind::Unknown);
    let begun = std::time::Instant::now();
    assert_eq!(double(&pair.a, 1).await.unwrap_err().kind(), ErrorKind::Unknown);
    assert!(
        begun.elapsed() < Duration::from_millis(3_500),
        "a silent peer is noticed: {:?}",
        begun.elapsed()
    );
    assert!(pair.a.peer_silent_ms(&name("b")).unwrap() >= 2_000);
    let gone = proxy.address();
    proxy.stop().await;
    // Nobody listens: nothing can have been sent.
    let begun = std::time::Instant::now();
    for _ in 0..3 {
        assert_eq!(double(&pair.a, 1).await.unwrap_err().kind(), ErrorKind::Unavailable);
    }
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    pair.a.set_addresses(&name("b"), vec![gone, pair.listening.address()]);
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    assert_eq!(double(&pair.a, 1).await.unwrap(), 2, "the second address is tried");
}

#[tokio::test]
async fn a_kept_host_that_dies_is_noticed_within_two_seconds_and_found_again() {
    let pair = pair(doubling()).await;
    let proxy = Proxy::start(pair.listening.address()).await;
    pair.a.set_addresses(&name("b"), vec![proxy.address()]);
    let kept = pair.a.keep(&name("b"));
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    assert!(kept.silent_ms().unwrap() < 1_200, "pings are answered: {:?}", kept.silent_ms());
    proxy.set(Mode::LoseAnswers);
    tokio::time::timeout(Duration::from_millis(3_500), kept.until_silent(2_000)).await.unwrap();
    proxy.set(Mode::Pass);
    tokio::time::sleep(Duration::from_millis(3_000)).await;
    assert!(kept.silent_ms().unwrap() < 1_200, "{:?}", kept.silent_ms());
}

#[tokio::test]
async fn a_peer_that_restarts_is_reached_again() {
    let mut pair = pair(doubling()).await;
    assert_eq!(double(&pair.a, 1).await.unwrap(), 2);
    let address = pair.listening.address();
    drop(pair.listening);
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(double(&pair.a, 1).await.unwrap_err().kind(), ErrorKind::Unavailable);
    pair.listening = pair.b.listen(address, doubling()).await.unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(double(&pair.a, 1).await.unwrap(), 2);
}

#[tokio::test]
async fn garbage_from_a_member_ends_its_connection_only() {
    let pair = pair(doubling()).await;
    let config = tls::client(pair.a.credentials(), whimbrel_wire::peer::ALPN_PEER).unwrap();
    for garbage in [&[0xff; 4096][..], b"GET / HTTP/1.1\r\n\r\n", &[0; 16]] {
        let tcp = TcpStream::connect(pair.listening.address()).await.unwrap();
        let server = rustls::pki_types::ServerName::from(pair.listening.address().ip());
        let mut tls = tokio_rustls::TlsConnector::from(config.clone()).connect(server, tcp).await.unwrap();
        tls.write_all(garbage).await.unwrap();
        let mut bytes = Vec::new();
        let _ = tls.read_to_end(&mut bytes).await;
        assert!(String::from_utf8_lossy(&bytes).contains("read a"), "{bytes:?}");
    }
    assert_eq!(double(&pair.a, 1).await.unwrap(), 2);
}

/// Prints the speed of one stream; the bound is far below any machine of interest.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_is_fast() {
    let pair = pair(doubling()).await;
    let mut stream = pair.a.stream(&name("b"), "migrate.sink", &(), SOON).await.unwrap();
    let bytes = vec![0x5a; 1 << 20];
    let begun = std::time::Instant::now();
    let total = 512u64 << 20;
    for _ in 0..total / bytes.len() as u64 {
        stream.write_all(&bytes).await.unwrap();
    }
    stream.shutdown().await.unwrap();
    let mut counted = [0; 8];
    stream.read_exact(&mut counted).await.unwrap();
    assert_eq!(u64::from_le_bytes(counted), total);
    let rate = total as f64 / begun.elapsed().as_secs_f64() / 1e9;
    eprintln!("one TLS 1.3 stream over loopback: {rate:.2} GB/s");
    assert!(rate > 0.01);
}
