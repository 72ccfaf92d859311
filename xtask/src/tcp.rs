//! A TCP client of the workload, which sees whether a connection survives.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

/// Port of the workload's echo.
const ECHO_PORT: u16 = 7;
const LIMIT: Duration = Duration::from_secs(15);

/// One connection, never made anew.
pub struct Client(TcpStream);

impl Client {
    /// Connects to the guest's echo and tries it.
    pub fn connect(address: &str) -> Result<Client> {
        let address = format!("{address}:{ECHO_PORT}").parse().context("read the guest's address")?;
        let stream = TcpStream::connect_timeout(&address, LIMIT).context("connect to the guest")?;
        stream.set_read_timeout(Some(LIMIT)).context("limit reads")?;
        let mut client = Client(stream);
        client.echo("hello")?;
        Ok(client)
    }

    /// Sends a word and wants it back.
    pub fn echo(&mut self, word: &str) -> Result<()> {
        self.0.write_all(word.as_bytes()).context("send to the guest")?;
        let mut back = vec![0; word.len()];
        self.0.read_exact(&mut back).context("hear from the guest")?;
        if back != word.as_bytes() {
            bail!("the guest's echo differs");
        }
        Ok(())
    }
}
