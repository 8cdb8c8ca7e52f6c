//! The streaming service: its one method carries messages in both directions, of any kind.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use ttrpc::asynchronous::{Service, StreamHandler, StreamInner, TtrpcContext};
use ttrpc::proto::{Response, ResponseInit as _};

use crate::streams::Streams;

const METHOD: &str = "Stream";

struct Streaming(Streams);

#[async_trait]
impl StreamHandler for Streaming {
    async fn handler(&self, _: TtrpcContext, stream: StreamInner) -> ttrpc::Result<Option<Response>> {
        match self.0.serve(ttrpc::asynchronous::ServerStream::new(stream)).await {
            Ok(()) => Ok(None),
            Err(ttrpc::Error::RpcStatus(status)) => Ok(Some(Response::init_status(status))),
            // Nobody is there to be told.
            Err(error) => {
                tracing::debug!("a stream broke off: {error}");
                Ok(None)
            }
        }
    }
}

/// The service.
pub fn service(streams: &Streams) -> Service {
    let handler: Arc<dyn StreamHandler + Send + Sync> = Arc::new(Streaming(streams.clone()));
    Service { methods: HashMap::new(), streams: HashMap::from([(METHOD.to_owned(), handler)]) }
}
