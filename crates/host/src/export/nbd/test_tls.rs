//! NBD over TCP: nothing without TLS, nothing without the right certificate.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::Duration;

use whimbrel_wire::{HostId, Role};

use super::{NbdOptions, NbdPlace, NbdServer};
use crate::cluster::{Authority, Subject};
use crate::export::DeviceSlot;
use crate::export::test_device::RamDevice;
use crate::link::{ExportTls, LinkOptions, Links};

struct Bench {
    dir: tempfile::TempDir,
    authority: Authority,
    links: Links,
    port: u16,
    server: NbdServer,
}

impl Bench {
    fn start() -> Self {
        let authority = Authority::generate(&"test".parse().unwrap()).unwrap();
        // Clients compare the name that they connect to with those in the certificate.
        let name: HostId = "localhost".parse().unwrap();
        let links = Links::new(authority.credentials(Role::Host, &name).unwrap(), LinkOptions::default());
        let links = links.unwrap();
        let slot = DeviceSlot::active(Arc::new(RamDevice::new(16 << 20)));
        let options =
            NbdOptions { name: "disk".into(), patience: Duration::from_secs(10), ..NbdOptions::default() };
        let tls = ExportTls::new(&links).unwrap();
        let server = NbdServer::start_tcp("127.0.0.1:0".parse().unwrap(), tls, slot, options).unwrap();
        let NbdPlace::Tcp(address) = server.place() else { panic!("{}", server.place()) };
        Self { dir: tempfile::tempdir().unwrap(), authority, links, port: address.port(), server }
    }

    /// A directory with a certificate of `by`, as GnuTLS's users lay it out.
    fn certificate(&self, by: &Authority, role: Role, name: &str) -> PathBuf {
        let subject = Subject { role, name: name.parse().unwrap(), generation: 1 };
        let (certificate, key) = by.issue(&subject, 3600).unwrap();
        let dir = tempfile::tempdir_in(self.dir.path()).unwrap().keep();
        std::fs::write(dir.join("ca-cert.pem"), self.authority.certificate_pem()).unwrap();
        std::fs::write(dir.join("client-cert.pem"), certificate).unwrap();
        std::fs::write(dir.join("client-key.pem"), key).unwrap();
        dir
    }

    fn nbdsh(&self, scheme: &str, certificates: Option<&Path>, script: &str) -> Output {
        let certificates =
            certificates.map_or(String::new(), |dir| format!("?tls-certificates={}", dir.display()));
        let uri = format!("{scheme}://localhost:{}/disk{certificates}", self.port);
        let connect = format!("h.set_uri_allow_local_file(True)\nh.connect_uri('{uri}')");
        let path = format!("/usr/bin:{}", std::env::var("PATH").unwrap_or_default());
        let output = Command::new("timeout")
            .args(["60", "nbdsh", "-c", &connect, "-c", script])
            .env("PATH", path)
            .output()
            .unwrap();
        assert_ne!(output.status.code(), Some(127), "nbdsh is missing: install the package python3-libnbd");
        output
    }

    fn is_refused(&self, scheme: &str, certificates: Option<&Path>, what: &str) {
        let output = self.nbdsh(scheme, certificates, "h.pread(512, 0)");
        assert!(!output.status.success(), "{what}");
    }
}

const USE: &str = "
data = bytes(range(256)) * 16384
h.pwrite(data, 4096, nbd.CMD_FLAG_FUA)
assert bytes(h.pread(len(data), 4096)) == data
h.zero(65536, 4096)
h.flush()
assert bytes(h.pread(len(data), 4096)) == bytes(65536) + data[65536:]
";

#[test]
fn a_client_with_the_right_certificate_uses_the_disk() {
    let bench = Bench::start();
    for role in [Role::Operator, Role::Host] {
        let dir = bench.certificate(&bench.authority, role, "somebody");
        let output = bench.nbdsh("nbds", Some(&dir), USE);
        assert!(output.status.success(), "{role}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn everybody_else_is_told_nothing() {
    let bench = Bench::start();
    bench.is_refused("nbd", None, "no TLS");
    for role in [Role::Reader, Role::Guest] {
        let dir = bench.certificate(&bench.authority, role, "somebody");
        bench.is_refused("nbds", Some(&dir), &role.to_string());
    }
    let other = Authority::generate(&"test".parse().unwrap()).unwrap();
    let dir = bench.certificate(&other, Role::Operator, "somebody");
    bench.is_refused("nbds", Some(&dir), "another cluster's operator");
    // A host that was removed.
    bench.links.refuse(&"gone".parse().unwrap(), 2);
    let dir = bench.certificate(&bench.authority, Role::Host, "gone");
    bench.is_refused("nbds", Some(&dir), "a removed host");
    let dir = bench.certificate(&bench.authority, Role::Operator, "gone");
    assert!(bench.nbdsh("nbds", Some(&dir), USE).status.success(), "an operator of the same name");
    // One that is removed while it is connected.
    let dir = bench.certificate(&bench.authority, Role::Host, "leaving");
    let mark = bench.dir.path().join("connected");
    let script = format!(
        "import os, time\nh.pread(512, 0)\nopen('{0}', 'w').close()\nwhile os.path.exists('{0}'): time.sleep(0.01)\n\
         h.pread(512, 0)",
        mark.display()
    );
    std::thread::scope(|scope| {
        let client = scope.spawn(|| bench.nbdsh("nbds", Some(&dir), &script));
        while !mark.exists() {
            assert!(!client.is_finished(), "it was not let in");
            std::thread::sleep(Duration::from_millis(5));
        }
        bench.links.refuse(&"leaving".parse().unwrap(), 2);
        std::fs::remove_file(&mark).unwrap();
        assert!(!client.join().unwrap().status.success(), "it reads after it was removed");
    });
    bench.server.stop().unwrap();
}
