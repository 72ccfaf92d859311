//! TCP for clients outside: port 7 echoes, port 7000 sends a numbered line every 10 ms. A client sees from them
//! whether a connection survived.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

/// More connections than this are closed at once.
const MAX_CONNECTIONS: usize = 32;
static OPEN: AtomicUsize = AtomicUsize::new(0);

/// Starts both servers; a machine without network keeps them idle.
pub fn start() {
    thread::spawn(|| serve(7, echo));
    thread::spawn(|| serve(7000, stream));
}

fn serve(port: u16, handler: fn(&mut TcpStream) -> std::io::Result<()>) {
    let Ok(listener) = TcpListener::bind(("0.0.0.0", port)) else { return };
    for socket in listener.incoming() {
        match socket {
            Ok(mut socket) => {
                if OPEN.fetch_add(1, Relaxed) >= MAX_CONNECTIONS {
                    OPEN.fetch_sub(1, Relaxed);
                    continue;
                }
                thread::spawn(move || {
                    // The end of a connection is the client's business.
                    drop(handler(&mut socket));
                    OPEN.fetch_sub(1, Relaxed);
                });
            }
            // Out of descriptors or the like: do not spin.
            Err(_) => thread::sleep(Duration::from_millis(100)),
        }
    }
}

fn echo(socket: &mut TcpStream) -> std::io::Result<()> {
    socket.set_nodelay(true)?;
    let mut buffer = [0u8; 16384];
    loop {
        let n = socket.read(&mut buffer)?;
        if n == 0 {
            return Ok(());
        }
        socket.write_all(&buffer[..n])?;
    }
}

fn stream(socket: &mut TcpStream) -> std::io::Result<()> {
    socket.set_nodelay(true)?;
    for n in 0u64.. {
        writeln!(socket, "{n}")?;
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
