#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# evil-agent.sh: build the agent that turns on its host, for the suite `hostile`,
# and print where its program is.
set -euo pipefail

# Within a suite PATH is the engines'; cargo says where it is.
[[ -z ${CARGO:-} ]] || PATH=$(dirname "$CARGO"):$PATH
exec "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/../packaging/cargo-static.sh" evil-agent
