//! The endpoints: a process that answers, floods and echoes.

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
};

use crate::ENDPOINT;

/// Endpoints of each Service port.
pub(crate) const COUNT: u16 = 4;
/// First ports: short answers, floods, datagrams.
pub(crate) const ANSWER: u16 = 7000;
pub(crate) const FLOOD: u16 = 7100;
pub(crate) const DATAGRAM: u16 = 7200;

/// Serves until it is killed.
pub(crate) fn serve() -> ! {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        for number in 0..COUNT {
            let bind = async |port| {
                TcpListener::bind((std::net::Ipv4Addr::from(ENDPOINT), port + number))
                    .await
                    .unwrap()
            };
            let (answer, flood) = (bind(ANSWER).await, bind(FLOOD).await);
            let address = (std::net::Ipv4Addr::from(ENDPOINT), DATAGRAM + number);
            let socket = UdpSocket::bind(address).await.unwrap();
            tokio::spawn(accept(answer, false));
            tokio::spawn(accept(flood, true));
            tokio::spawn(echo(socket));
        }
        std::future::pending().await
    })
}

async fn accept(listener: TcpListener, flood: bool) {
    loop {
        if let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(talk(stream, flood));
        }
    }
}

async fn talk(mut stream: TcpStream, flood: bool) {
    let mut question = [0; 16];
    if stream.read(&mut question).await.is_err() {
        return;
    }
    if !flood {
        stream.write_all(b"an answer of some bytes\n").await.ok();
        return;
    }
    let piece = vec![7; 256 << 10];
    while stream.write_all(&piece).await.is_ok() {}
}

async fn echo(socket: UdpSocket) {
    let mut buffer = [0; 2048];
    loop {
        if let Ok((bytes, from)) = socket.recv_from(&mut buffer).await {
            socket.send_to(buffer.get(..bytes).unwrap_or_default(), from).await.ok();
        }
    }
}
