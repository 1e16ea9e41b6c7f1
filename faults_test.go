// What must not lose an event: a stop under load, a kill, ClickHouse away, Kafka away, answers lost, instances that come and go.

package main

import (
	"fmt"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
)

// TestPausedWhilePlacedAnew: an instance that knows of one server sleeps while its events are spread over several.
func TestPausedWhilePlacedAnew(t *testing.T) {
	t.Parallel()
	env := newSpace(t)
	p := startProgram(t, env)
	drained(p)
	p.cmd.Process.Signal(syscall.SIGSTOP)
	cfg := settingsFrom(t, env)
	kafka, err := newKafka(cfg, "test")
	if err != nil {
		t.Fatal(err)
	}
	defer kafka.Close()
	p.await("missed", time.Minute, func() bool { return mustBeIdle(t.Context(), kadm.NewClient(kafka), cfg.kafkaGroup) == nil })
	table := cfg.clickhouseDatabase + ".events"
	clickhouseQuery(t, "ALTER TABLE "+table+" MODIFY COMMENT '"+fmt.Sprintf(placementForm, 1, 3, 20)+"'")
	p.cmd.Process.Signal(syscall.SIGCONT)
	p.await("accepting", time.Minute, func() bool {
		status, _, _ := p.do("POST", onePath, jsonCT, "", freshEvent("elsewhere"))
		return status == http.StatusAccepted
	})
	p.await("told so", time.Minute, func() bool {
		return strings.Contains(p.log.String(), errPlacement.Error()) || clickhouseQuery(t, "SELECT count() FROM "+table) != "0"
	})
	if n := clickhouseQuery(t, "SELECT count() FROM "+table); n != "0" {
		t.Error("an event is stored by the old placement")
	}
}
