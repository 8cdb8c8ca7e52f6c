//! The resolver that engines run at 127.0.0.11, as the guest's programs see it. The host asks the real one.

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::sync::Mutex;
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use runvm_protocol::dns::{MAX_IN_FLIGHT, Message, RESOLVER, Transport};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use crate::sync::lock;

const PORT: u16 = 53;

/// How many clients may be connected over TCP, each with one question at a time; the rest of what may be asked at
/// once is for UDP.
const MAX_CONNECTIONS: usize = 32;

/// How long an answer may take, and how long a client over TCP may take to ask.
const PATIENCE: Duration = Duration::from_secs(30);

/// The largest datagram.
const MAX_DATAGRAM: usize = 65_535;

/// Answers the guest's questions over the stream until the host closes it.
pub(crate) async fn serve(stream: impl AsyncRead + AsyncWrite) {
    let sockets = async { Ok((UdpSocket::bind((RESOLVER, PORT)).await?, TcpListener::bind((RESOLVER, PORT)).await?)) };
    let (udp, tcp) = match sockets.await {
        Ok(sockets) => sockets,
        Err::<_, io::Error>(error) => return tracing::warn!("cannot listen on {RESOLVER}:{PORT}: {error}"),
    };
    let ended = relay(stream, udp, tcp).await;
    tracing::debug!("look-ups are over: {ended}");
}

async fn relay(stream: impl AsyncRead + AsyncWrite, udp: UdpSocket, tcp: TcpListener) -> io::Error {
    let (mut answers, mut questions) = tokio::io::split(stream);
    let (asking, mut asked) = mpsc::channel::<Message>(MAX_IN_FLIGHT);
    let host = Host { asking, waiting: Mutex::default() };
    let sending = async {
        while let Some(question) = asked.recv().await {
            question.write(&mut questions).await?;
        }
        Ok::<_, io::Error>(())
    };
    let receiving = async {
        while let Some(answer) = Message::read(&mut answers).await? {
            host.answered(answer);
        }
        Err::<(), _>(io::Error::from(io::ErrorKind::UnexpectedEof))
    };
    let ended = tokio::select! {
        ended = sending => ended,
        ended = receiving => ended,
        ended = serve_udp(&host, &udp) => ended,
        ended = serve_tcp(&host, &tcp) => ended,
    };
    ended.err().unwrap_or_else(|| io::ErrorKind::BrokenPipe.into())
}

/// Who answers.
struct Host {
    asking: mpsc::Sender<Message>,
    waiting: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    last: u32,
    questions: HashMap<u32, oneshot::Sender<Vec<u8>>>,
}

impl Host {
    /// Asks, and waits for the answer; there may be none.
    async fn ask(&self, transport: Transport, payload: Vec<u8>) -> Option<Vec<u8>> {
        let (reply, answer) = oneshot::channel();
        let number = {
            let mut waiting = lock(&self.waiting);
            waiting.last = waiting.last.wrapping_add(1);
            let number = waiting.last;
            waiting.questions.insert(number, reply);
            number
        };
        let answered = async {
            self.asking.send(Message { number, transport, payload }).await.ok()?;
            answer.await.ok()
        };
        let answer = timeout(PATIENCE, answered).await.ok().flatten();
        lock(&self.waiting).questions.remove(&number);
        answer.filter(|payload| !payload.is_empty())
    }

    fn answered(&self, answer: Message) {
        if let Some(reply) = lock(&self.waiting).questions.remove(&answer.number) {
            // Whoever asked may have gone.
            let _ = reply.send(answer.payload);
        }
    }
}

async fn serve_udp(host: &Host, socket: &UdpSocket) -> io::Result<()> {
    let mut buffer = vec![0; MAX_DATAGRAM];
    let mut questions = FuturesUnordered::new();
    loop {
        tokio::select! {
            received = socket.recv_from(&mut buffer), if questions.len() < MAX_IN_FLIGHT - MAX_CONNECTIONS => {
                // An error is about an earlier answer that did not arrive.
                let Ok((length, client)) = received else { continue };
                let question = buffer[..length].to_vec();
                questions.push(async move { (host.ask(Transport::Udp, question).await, client) });
            }
            Some((answer, client)) = questions.next() => {
                if let Some(answer) = answer {
                    // The client may be gone, and would ask again where it is not.
                    let _ = socket.send_to(&answer, client).await;
                }
            }
        }
    }
}

async fn serve_tcp(host: &Host, listener: &TcpListener) -> io::Result<()> {
    let mut clients = FuturesUnordered::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if clients.len() < MAX_CONNECTIONS => {
                let (client, _) = accepted?;
                clients.push(serve_client(host, client));
            }
            Some(ended) = clients.next() => {
                if let Err(error) = ended {
                    tracing::debug!("a look-up over TCP ended: {error}");
                }
            }
        }
    }
}

async fn serve_client(host: &Host, mut client: TcpStream) -> io::Result<()> {
    loop {
        let length = in_time(client.read_u16()).await?;
        let mut question = vec![0; usize::from(length)];
        in_time(client.read_exact(&mut question)).await?;
        let Some(answer) = host.ask(Transport::Tcp, question).await else { return Ok(()) };
        let length = u16::try_from(answer.len()).map_err(io::Error::other)?;
        in_time(client.write_u16(length)).await?;
        in_time(client.write_all(&answer)).await?;
    }
}

async fn in_time<T>(step: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    timeout(PATIENCE, step).await?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn answers_find_who_asked() {
        let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (udp_address, tcp_address) = (udp.local_addr().unwrap(), tcp.local_addr().unwrap());
        let (ours, mut theirs) = tokio::io::duplex(4096);
        tokio::spawn(relay(ours, udp, tcp));
        tokio::spawn(async move {
            // Answers come in another order than the questions.
            let first = Message::read(&mut theirs).await.unwrap().unwrap();
            let second = Message::read(&mut theirs).await.unwrap().unwrap();
            for mut message in [second, first] {
                message.payload.extend(match message.transport {
                    Transport::Udp => b" by UDP",
                    Transport::Tcp => b" by TCP",
                });
                message.write(&mut theirs).await.unwrap();
            }
            std::future::pending::<()>().await;
        });
        let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        client.send_to(b"a?", udp_address).await.unwrap();
        let mut connection = TcpStream::connect(tcp_address).await.unwrap();
        connection.write_all(b"\x00\x02b?").await.unwrap();
        let mut answer = [0; 64];
        let length = client.recv(&mut answer).await.unwrap();
        assert_eq!(&answer[..length], b"a? by UDP");
        assert_eq!(connection.read_u16().await.unwrap(), 9);
        connection.read_exact(&mut answer[..9]).await.unwrap();
        assert_eq!(&answer[..9], b"b? by TCP");
    }

    #[tokio::test(start_paused = true)]
    async fn a_question_without_an_answer_is_forgotten() {
        let (asking, mut asked) = mpsc::channel(1);
        let host = Host { asking, waiting: Mutex::default() };
        assert_eq!(host.ask(Transport::Udp, b"?".to_vec()).await, None);
        assert!(asked.recv().await.is_some());
        assert!(lock(&host.waiting).questions.is_empty());
    }
}
