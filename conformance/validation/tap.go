// SPDX-License-Identifier: Apache-2.0

// Package tap says the results of tests in the Test Anything Protocol.
//
// It stands where the validation programs expect github.com/mndrix/tap-go,
// which the distribution does not have, and has what they use of it.
package tap

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
)

// T is the results of one program.
type T struct {
	// Writer takes them; by default it is the standard output.
	Writer io.Writer
	count  *int
	suffix string
}

// New makes one without results.
func New() *T {
	return &T{Writer: os.Stdout, count: new(int)}
}

func (t *T) line(format string, args ...interface{}) {
	fmt.Fprintf(t.Writer, format+"\n", args...)
}

// Header says how many tests there will be; with 0 AutoPlan says it.
func (t *T) Header(count int) {
	t.line("TAP version 13")
	if count > 0 {
		t.line("1..%d", count)
	}
}

// AutoPlan says how many tests there were.
func (t *T) AutoPlan() {
	t.line("1..%d", *t.count)
}

// Ok says how a test ended.
func (t *T) Ok(passed bool, name string) {
	*t.count++
	verdict := "ok"
	if !passed {
		verdict = "not ok"
	}
	t.line("%s %d - %s%s", verdict, *t.count, name, t.suffix)
}

// Pass says that a test passed.
func (t *T) Pass(name string) { t.Ok(true, name) }

// Fail says that a test failed.
func (t *T) Fail(name string) { t.Ok(false, name) }

// Skip says that some tests were not made.
func (t *T) Skip(count int, reason string) {
	for ; count > 0; count-- {
		*t.count++
		t.line("ok %d # SKIP %s", *t.count, reason)
	}
}

// Todo is for tests of which nobody expects that they pass.
func (t *T) Todo() *T {
	return &T{Writer: t.Writer, count: t.count, suffix: " # TODO"}
}

// Diagnostic says something about the last test.
func (t *T) Diagnostic(text string) {
	t.line("# %s", strings.ReplaceAll(strings.TrimRight(text, "\n"), "\n", "\n# "))
}

// Diagnosticf is Diagnostic with a format.
func (t *T) Diagnosticf(format string, args ...interface{}) {
	t.Diagnostic(fmt.Sprintf(format, args...))
}

// YAML says something structured about the last test: JSON, which is YAML.
func (t *T) YAML(value interface{}) error {
	text, err := json.MarshalIndent(value, "  ", "  ")
	if err == nil {
		t.line("  ---\n  %s\n  ...", text)
	}
	return err
}
