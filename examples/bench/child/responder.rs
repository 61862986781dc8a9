//! The endpoints of the data path: one process has them all.

use std::{error::Error, net::Ipv4Addr};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
};

use super::say;
use crate::world::TARGET_PORT;

/// Accepts until it is killed. Who says something is flooded.
pub(super) async fn respond() -> Result<(), Box<dyn Error>> {
    let socket = TcpSocket::new_v4()?;
    socket.bind((Ipv4Addr::UNSPECIFIED, TARGET_PORT).into())?;
    let listener = socket.listen(4096)?;
    say(&())?;
    loop {
        // A client that has hung up already is no news.
        if let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(talk(stream));
        }
    }
}

async fn talk(mut stream: TcpStream) {
    if !matches!(stream.read(&mut [0; 16]).await, Ok(1..)) {
        return;
    }
    let piece = vec![7; 256 << 10];
    while stream.write_all(&piece).await.is_ok() {}
}
