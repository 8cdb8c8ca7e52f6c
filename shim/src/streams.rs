//! Stdio by containerd's streaming service: containerd connects to the shim, names a stream, and sends or takes its bytes.
//!
//! It opens the streams of a process before it asks for the process, and opens them anew when it has been restarted. So a
//! stream has a place under its name where the process and whoever carries its bytes find each other. The place is the
//! process's; a client that finds none waits there for one.

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};

use percent_encoding::percent_decode_str;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::empty::Empty;
use protobuf::{Message as _, MessageFull};
use runvm::agent::{Sink, Source};
use thiserror::Error;
use tokio::io::{AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream, duplex};
use tokio::select;
use tokio::sync::{Mutex as Turn, watch};
use ttrpc::Code;
use ttrpc::asynchronous::{SSReceiver, SSSender, ServerStream};

use crate::connections::Connections;
use crate::sync::lock;
use crate::wire;
use crate::wire::streaming::StreamInit;
use crate::wire::transfer::{Data, WindowUpdate};

/// So many places at most, those of clients that wait for a process among them.
const MAX_PLACES: usize = 4096;
/// What a client may send without being asked for more, and what waits here to be sent to it, in bytes: containerd's window.
const WINDOW: usize = 64 << 10;
/// The bytes of one message at most, as containerd has it.
const PIECE: usize = 32 << 10;

/// A stream that cannot be had.
#[derive(Debug, Error)]
pub enum StreamError {
    /// Two processes with one stream.
    #[error("the stream {0} is another process's")]
    Taken(String),
    /// [`MAX_PLACES`].
    #[error("there are {MAX_PLACES} streams, and no more can be had")]
    TooMany,
}

/// The streams of a shim's processes.
#[derive(Clone, Default)]
pub struct Streams {
    /// The address of the shim's socket.
    socket: Arc<str>,
    connections: Connections,
    places: Arc<Mutex<HashMap<String, Arc<Place>>>>,
}

/// What is at a place.
#[derive(Clone)]
enum Pipe {
    /// The process has not come yet.
    Awaited,
    Output(Arc<Turn<Outgoing>>),
    Input(Arc<Turn<DuplexStream>>),
    /// Nothing goes in or out any more.
    Closed,
}

struct Place {
    pipe: watch::Sender<Pipe>,
    /// How many clients have come: the last one has the stream.
    clients: watch::Sender<u64>,
}

/// A place as its process has it: with this it is given up.
pub struct Claim {
    streams: Streams,
    id: String,
    place: Arc<Place>,
}

/// An input as its process has it: without this it ends once the client has left.
pub struct OpenInput(Arc<Place>);

/// The output that no client has got yet.
struct Outgoing {
    pipe: DuplexStream,
    pending: Vec<u8>,
    sent: watch::Sender<u64>,
}

impl Streams {
    /// Those that are found at this address, by these connections.
    pub fn at(socket: &str, connections: &Connections) -> Self {
        Self { socket: socket.into(), connections: connections.clone(), places: Arc::default() }
    }

    /// The name of the stream that containerd addresses so: `ttrpc+ADDRESS?streaming_id=NAME`. None where it is not here.
    pub fn named(&self, address: &str) -> Option<String> {
        let (socket, query) = address.strip_prefix("ttrpc+")?.split_once('?')?;
        let name = query.split('&').find_map(|pair| pair.strip_prefix("streaming_id="))?;
        (socket == &*self.socket).then(|| percent_decode_str(name).decode_utf8_lossy().into_owned())
    }

    /// The sink of an output. It is flushed when a client has got all.
    ///
    /// # Errors
    /// [`StreamError`].
    pub fn output(&self, id: &str) -> Result<(Sink, Claim), StreamError> {
        let (ours, theirs) = duplex(WINDOW);
        let sent = watch::Sender::new(0);
        let sink = OutgoingSink { pipe: theirs, written: 0, sent: sent.subscribe(), progress: None };
        let outgoing = Outgoing { pipe: ours, pending: Vec::new(), sent };
        let claim = self.claim(id, Pipe::Output(Arc::new(Turn::new(outgoing))))?;
        Ok((Sink::Stream(Box::new(sink)), claim))
    }

    /// The source of an input.
    ///
    /// # Errors
    /// [`StreamError`].
    pub fn input(&self, id: &str) -> Result<(Source, OpenInput, Claim), StreamError> {
        let (ours, theirs) = duplex(WINDOW);
        let claim = self.claim(id, Pipe::Input(Arc::new(Turn::new(ours))))?;
        Ok((Box::new(theirs), OpenInput(claim.place.clone()), claim))
    }

    /// Carries a client's stream to its end, or to when another client has come for it.
    ///
    /// # Errors
    /// Those of the connection, and what the client does wrong.
    pub async fn serve(&self, stream: ServerStream<Any, Any>) -> ttrpc::Result<()> {
        let (sender, mut receiver) = stream.split();
        let Some(mut first) = receiver.recv().await? else { return Ok(()) };
        // The request that opens the stream has no message in it. Go's library does not say so, and an empty one arrives.
        if first == Any::default() {
            let Some(next) = receiver.recv().await? else { return Ok(()) };
            first = next;
        }
        let init: StreamInit = unwrap(&first)?;
        let place = self.place(&init.id).map_err(|error| status(Code::RESOURCE_EXHAUSTED, &error.to_string()))?;
        let turn = place.next_client();
        sender.send(&wrap(&Empty::new())?).await?;
        let carried = select! {
            () = place.gone_over(turn) => Ok(()),
            carried = place.carry(&sender, &mut receiver) => carried,
        };
        self.forget(&init.id, turn);
        carried
    }

    fn claim(&self, id: &str, pipe: Pipe) -> Result<Claim, StreamError> {
        let place = self.place(id)?;
        let claimed = place.pipe.send_if_modified(|there| {
            let free = matches!(there, Pipe::Awaited);
            if free {
                *there = pipe;
            }
            free
        });
        match claimed {
            true => Ok(Claim { streams: self.clone(), id: id.to_owned(), place }),
            false => Err(StreamError::Taken(id.to_owned())),
        }
    }

    fn place(&self, id: &str) -> Result<Arc<Place>, StreamError> {
        let mut places = lock(&self.places);
        if let Some(place) = places.get(id) {
            return Ok(place.clone());
        }
        if places.len() >= MAX_PLACES {
            return Err(StreamError::TooMany);
        }
        let place = Arc::new(Place { pipe: watch::Sender::new(Pipe::Awaited), clients: watch::Sender::new(0) });
        places.insert(id.to_owned(), place.clone());
        Ok(place)
    }

    /// Removes a place where nobody is when this client has left.
    fn forget(&self, id: &str, client: u64) {
        let mut places = lock(&self.places);
        let deserted =
            |place: &Arc<Place>| matches!(*place.pipe.borrow(), Pipe::Awaited) && *place.clients.borrow() == client;
        if places.get(id).is_some_and(deserted) {
            places.remove(id);
        }
    }
}

impl Claim {
    /// Returns when no client takes this output any more: each that has got all of it has left.
    pub fn parted(&self) -> impl Future<Output = ()> + Send + use<> {
        let pipe = self.place.pipe.borrow().clone();
        let connections = self.streams.connections.clone();
        let init = StreamInit { id: self.id.clone(), ..Default::default() };
        async move {
            if let Pipe::Output(outgoing) = pipe {
                drop(outgoing.lock().await);
                // Without a message nobody has come with it.
                if let Ok(first) = wire::any(&init).and_then(|init| init.write_to_bytes()) {
                    connections.left(&first).await;
                }
            }
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        lock(&self.streams.places).remove(&self.id);
        self.place.pipe.send_replace(Pipe::Closed);
        self.place.next_client();
    }
}

impl Drop for OpenInput {
    fn drop(&mut self) {
        self.0.pipe.send_replace(Pipe::Closed);
    }
}

impl Place {
    fn next_client(&self) -> u64 {
        self.clients.send_modify(|clients| *clients += 1);
        *self.clients.borrow()
    }

    /// Returns when the stream is no more this client's.
    async fn gone_over(&self, client: u64) {
        // An error cannot be: the sending end is this place's own.
        let _ = self.clients.subscribe().wait_for(|&clients| clients != client).await;
    }

    async fn carry(&self, sender: &SSSender<Any>, receiver: &mut SSReceiver<Any>) -> ttrpc::Result<()> {
        let mut window = 0;
        let mut pipe = self.pipe.subscribe();
        loop {
            let there = pipe.borrow_and_update().clone();
            match there {
                Pipe::Output(outgoing) => {
                    let mut outgoing = outgoing.lock().await;
                    return outgoing.give(window, sender, receiver).await;
                }
                Pipe::Input(incoming) => {
                    let mut incoming = incoming.lock().await;
                    return take(&mut incoming, pipe, sender, receiver).await;
                }
                Pipe::Closed => return Ok(()),
                Pipe::Awaited => {}
            }
            select! {
                // An error cannot be, as above.
                _ = pipe.changed() => {}
                message = receiver.recv() => match message? {
                    Some(message) => widen(&mut window, &message)?,
                    None => return Ok(()),
                },
            }
        }
    }
}

impl Outgoing {
    /// Sends what the process writes, as far as the client's window goes, to the end of either.
    async fn give(
        &mut self,
        mut window: usize,
        sender: &SSSender<Any>,
        receiver: &mut SSReceiver<Any>,
    ) -> ttrpc::Result<()> {
        let Self { pipe, pending, sent } = self;
        let mut piece = vec![0; PIECE];
        loop {
            let length = window.min(pending.len());
            if length > 0 {
                sender.send(&wrap(&Data { data: pending[..length].to_vec(), ..Default::default() })?).await?;
                pending.drain(..length);
                window -= length;
                sent.send_modify(|sent| *sent += length as u64);
                continue;
            }
            select! {
                message = receiver.recv() => match message? {
                    Some(message) => widen(&mut window, &message)?,
                    None => return Ok(()),
                },
                read = pipe.read(&mut piece), if pending.is_empty() => match read {
                    Ok(length @ 1..) => pending.extend_from_slice(&piece[..length]),
                    Ok(0) | Err(_) => return Ok(()),
                },
            }
        }
    }
}

/// Hands a process what the client sends, to the end of either.
async fn take(
    incoming: &mut DuplexStream,
    mut pipe: watch::Receiver<Pipe>,
    sender: &SSSender<Any>,
    receiver: &mut SSReceiver<Any>,
) -> ttrpc::Result<()> {
    let allow = async |bytes: usize| {
        let update = i32::try_from(bytes).unwrap_or(i32::MAX);
        sender.send(&wrap(&WindowUpdate { update, ..Default::default() })?).await
    };
    let mut window = WINDOW;
    allow(window).await?;
    loop {
        select! {
            message = receiver.recv() => {
                let Some(message) = message? else { return Ok(()) };
                let Data { data, .. } = unwrap(&message)?;
                window = window.checked_sub(data.len()).ok_or_else(|| invalid("more than the window is sent"))?;
                // The process has closed its end.
                if incoming.write_all(&data).await.is_err() {
                    return Ok(());
                }
                window += data.len();
                allow(data.len()).await?;
            }
            // It is to end with the client, which is gone without a word if nothing can be sent to it.
            _ = pipe.changed() => allow(0).await?,
        }
    }
}

fn widen(window: &mut usize, message: &Any) -> ttrpc::Result<()> {
    let WindowUpdate { update, .. } = unwrap(message)?;
    let update = usize::try_from(update).map_err(|_| invalid("a window grows only"))?;
    *window = window.saturating_add(update);
    Ok(())
}

fn wrap<M: MessageFull>(message: &M) -> ttrpc::Result<Any> {
    wire::any(message).map_err(|error| status(Code::INTERNAL, &error.to_string()))
}

fn unwrap<M: MessageFull>(message: &Any) -> ttrpc::Result<M> {
    wire::unwrap(message).ok_or_else(|| invalid(&format!("{} is not what comes here", message.type_url)))
}

fn invalid(reason: &str) -> ttrpc::Error {
    status(Code::INVALID_ARGUMENT, reason)
}

fn status(code: Code, reason: &str) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, reason))
}

/// The process's end of an output.
struct OutgoingSink {
    pipe: DuplexStream,
    written: u64,
    sent: watch::Receiver<u64>,
    /// Returns when more was sent; false when nothing will be any more.
    progress: Option<Pin<Box<dyn Future<Output = bool> + Send>>>,
}

impl AsyncWrite for OutgoingSink {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.pipe).poll_write(context, bytes))?;
        self.written += written as u64;
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let written = self.written;
            if *self.sent.borrow_and_update() >= written {
                return Poll::Ready(Ok(()));
            }
            let mut sent = self.sent.clone();
            let progress = self.progress.get_or_insert_with(|| Box::pin(async move { sent.changed().await.is_ok() }));
            let goes_on = ready!(progress.as_mut().poll(context));
            self.progress = None;
            if !goes_on {
                return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
            }
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.pipe).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::net::{UnixListener, UnixStream};
    use tokio::time::timeout;
    use ttrpc::asynchronous::transport::Socket;
    use ttrpc::asynchronous::{CSReceiver, CSSender, Client, ClientStream, Server};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    /// A client of the streaming service, as containerd is one.
    struct Connected {
        sender: CSSender<Any>,
        receiver: CSReceiver<Any>,
        _client: Client,
    }

    impl Connected {
        async fn receive<M: MessageFull>(&mut self) -> Option<M> {
            let message = timeout(LIMIT, self.receiver.recv()).await.expect("an answer");
            message.ok().map(|message| wire::unwrap(&message).expect("the message that is due"))
        }

        async fn send<M: MessageFull>(&self, message: &M) {
            self.sender.send(&wire::any(message).unwrap()).await.unwrap();
        }

        async fn widen(&self, update: i32) {
            self.send(&WindowUpdate { update, ..Default::default() }).await;
        }

        async fn data(&mut self) -> Option<Vec<u8>> {
            self.receive::<Data>().await.map(|data| data.data)
        }
    }

    struct Served {
        streams: Streams,
        folder: tempfile::TempDir,
        _server: Server,
    }

    impl Served {
        async fn begin() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let connections = Connections::default();
            let streams = Streams::at("unix:///s", &connections);
            let listener = connections.accept(UnixListener::bind(folder.path().join("s")).unwrap());
            let services = HashMap::from([("S".to_owned(), crate::service::streaming(&streams))]);
            let mut server = Server::new().add_listener(listener).register_service(services);
            server.start().await.unwrap();
            Self { streams, folder, _server: server }
        }

        async fn connect(&self, id: &str) -> Connected {
            let socket = UnixStream::connect(self.folder.path().join("s")).await.unwrap();
            let client = Client::new(Socket::new(socket));
            let request = ttrpc::proto::Request { service: "S".into(), method: "Stream".into(), ..Default::default() };
            let inner = client.new_stream(request, true, true).await.unwrap();
            let (sender, receiver) = ClientStream::new(inner).split();
            let mut connected = Connected { sender, receiver, _client: client };
            connected.send(&StreamInit { id: id.to_owned(), ..Default::default() }).await;
            connected.receive::<Empty>().await.expect("the stream is there");
            connected
        }
    }

    #[tokio::test]
    async fn output_flows_within_the_window_and_ends() {
        let served = Served::begin().await;
        // The client is there first, as containerd is.
        let mut client = served.connect("a-stdout").await;
        let (sink, claim) = served.streams.output("a-stdout").unwrap();
        let mut sink = sink.into_writer();
        sink.write_all(b"12345").await.unwrap();
        client.widen(2).await;
        assert_eq!(client.data().await.unwrap(), b"12");
        // Flushed is what was sent.
        assert!(timeout(Duration::from_millis(50), sink.flush()).await.is_err());
        client.widen(100).await;
        assert_eq!(client.data().await.unwrap(), b"345");
        timeout(LIMIT, sink.flush()).await.unwrap().unwrap();
        drop(sink);
        assert_eq!(client.data().await, None);
        assert!(timeout(Duration::from_millis(50), claim.parted()).await.is_err(), "the client has not left");
        client.sender.close_send().await.unwrap();
        timeout(LIMIT, claim.parted()).await.unwrap();
        assert!(matches!(served.streams.output("a-stdout"), Err(StreamError::Taken(_))));
        drop(claim);
        assert!(lock(&served.streams.places).is_empty());
    }

    #[tokio::test]
    async fn who_comes_again_has_the_stream_and_what_was_not_sent() {
        let served = Served::begin().await;
        let (sink, _claim) = served.streams.output("a").unwrap();
        let mut sink = sink.into_writer();
        let mut first = served.connect("a").await;
        first.widen(3).await;
        sink.write_all(b"abcdef").await.unwrap();
        assert_eq!(first.data().await.unwrap(), b"abc");
        let mut second = served.connect("a").await;
        assert_eq!(first.data().await, None, "the first has lost it");
        second.widen(100).await;
        assert_eq!(second.data().await.unwrap(), b"def");
    }

    #[tokio::test]
    async fn input_comes_as_far_as_it_is_allowed_and_ends_with_both() {
        let served = Served::begin().await;
        let (mut source, open, _claim) = served.streams.input("i").unwrap();
        let mut client = served.connect("i").await;
        let WindowUpdate { update, .. } = client.receive().await.unwrap();
        assert_eq!(update as usize, WINDOW);
        client.send(&Data { data: b"hello".to_vec(), ..Default::default() }).await;
        let mut bytes = [0; 5];
        timeout(LIMIT, source.read_exact(&mut bytes)).await.unwrap().unwrap();
        assert_eq!(&bytes, b"hello");
        assert_eq!(client.receive::<WindowUpdate>().await.unwrap().update, 5);
        // A client that leaves does not end it, and what it has sent before the input is closed arrives.
        client.sender.close_send().await.unwrap();
        assert!(timeout(Duration::from_millis(50), source.read(&mut bytes)).await.is_err());
        let mut client = served.connect("i").await;
        client.receive::<WindowUpdate>().await.unwrap();
        client.send(&Data { data: b"late".to_vec(), ..Default::default() }).await;
        client.sender.close_send().await.unwrap();
        drop(open);
        timeout(LIMIT, source.read_exact(&mut bytes[..4])).await.unwrap().unwrap();
        assert_eq!(timeout(LIMIT, source.read(&mut bytes)).await.unwrap().unwrap(), 0);
    }

    #[tokio::test]
    async fn an_input_that_is_closed_ends_although_its_client_went_without_a_word() {
        let served = Served::begin().await;
        let (mut source, open, _claim) = served.streams.input("i").unwrap();
        let mut client = served.connect("i").await;
        client.receive::<WindowUpdate>().await.unwrap();
        drop(client);
        drop(open);
        assert_eq!(timeout(LIMIT, source.read(&mut [0; 1])).await.unwrap().unwrap(), 0);
    }

    #[tokio::test]
    async fn what_a_client_may_not_send_ends_its_stream() {
        let served = Served::begin().await;
        let (_sink, _claim) = served.streams.output("o").unwrap();
        let (_source, _open, _other) = served.streams.input("i").unwrap();
        for (id, message) in [
            ("o", wire::any(&Data::default()).unwrap()),
            ("o", wire::any(&WindowUpdate { update: -1, ..Default::default() }).unwrap()),
            ("i", wire::any(&WindowUpdate::default()).unwrap()),
            ("i", wire::any(&Data { data: vec![0; WINDOW + 1], ..Default::default() }).unwrap()),
        ] {
            let mut client = served.connect(id).await;
            client.sender.send(&message).await.unwrap();
            let error = loop {
                match timeout(LIMIT, client.receiver.recv()).await.unwrap() {
                    Ok(_) => {}
                    Err(error) => break error,
                }
            };
            assert!(
                matches!(&error, ttrpc::Error::RpcStatus(status) if status.code() == Code::INVALID_ARGUMENT),
                "{error}"
            );
        }
    }

    #[tokio::test]
    async fn places_where_nobody_is_are_not_kept() {
        let served = Served::begin().await;
        let client = served.connect("nobody").await;
        assert_eq!(lock(&served.streams.places).len(), 1);
        client.sender.close_send().await.unwrap();
        timeout(LIMIT, async {
            while !lock(&served.streams.places).is_empty() {
                tokio::task::yield_now().await;
            }
        })
        .await
        .unwrap();
    }

    #[test]
    fn streams_are_those_of_one_socket() {
        let streams = Streams::at("unix:///run/s/1", &Connections::default());
        assert_eq!(streams.named("ttrpc+unix:///run/s/1?streaming_id=a%2Db-stdin").as_deref(), Some("a-b-stdin"));
        for other in ["", "/run/fifo", "ttrpc+unix:///run/s/2?streaming_id=a", "ttrpc+unix:///run/s/1?id=a"] {
            assert_eq!(streams.named(other), None, "{other}");
        }
    }
}
