use crate::error::RequestError;
use runvm_protocol::agent;
pub(crate) async fn configure(_request: &agent::ConfigureNetworkRequest) -> Result<(), RequestError> {
    Ok(())
}
