//! Taps, in a network of their own.
#![expect(unsafe_code, reason = "moves the test's thread into a network namespace of its own")]

use std::process::Command;

use whimbrel_host::ErrorKind;
use whimbrel_host::guest::tap::Tap;

fn ip(args: &[&str]) -> String {
    let output = Command::new("ip").args(args).output().expect("the program ip (Debian package iproute2)");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn a_tap_is_on_its_bridge_and_up_and_goes_with_its_descriptor() {
    if !rustix::process::geteuid().is_root() {
        println!("not shown: making network interfaces takes root");
        return;
    }
    // A thread of its own: the namespace ends with it.
    let thread = std::thread::spawn(|| {
        // SAFETY: changes the network of this thread alone.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }.unwrap();
        let error = Tap::create(None, "br-missing").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
        assert_eq!(Tap::create(None, "a-name-that-is-too-long").unwrap_err().kind(), ErrorKind::Io);
        ip(&["link", "add", "wbr0", "type", "bridge"]);
        let tap = Tap::create(None, "wbr0").unwrap();
        let name = tap.name().to_owned();
        let shown = ip(&["-o", "link", "show", "dev", &name]);
        assert!(shown.contains("master wbr0") && shown.contains(",UP"), "{shown}");
        let other = Tap::create(Some("wbt-own"), "wbr0").unwrap();
        assert_eq!(other.name(), "wbt-own");
        assert!(Tap::create(Some("wbt-own"), "wbr0").is_err(), "one descriptor per tap");
        drop(tap);
        assert!(ip(&["-o", "link", "show"]).contains("wbt-own"));
        assert!(!ip(&["-o", "link", "show"]).contains(&name), "it went with its descriptor");
        let fd = other.into_fd();
        assert!(ip(&["-o", "link", "show"]).contains("wbt-own"), "handed over, it stays");
        drop(fd);
        assert!(!ip(&["-o", "link", "show"]).contains("wbt-own"));
    });
    thread.join().unwrap();
}
