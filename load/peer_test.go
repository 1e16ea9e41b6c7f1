// The peer: what load sends to in its tests.
//
// It is not a mock of the system: it is a program that answers as the API does, with a map for a store, so that a fault can be
// put exactly where a test wants it. The system itself is tested in the package above.

package load

import (
	"compress/gzip"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// peerEvent is what the peer keeps of an event.
type peerEvent struct {
	Name      string `json:"event_name"`
	UserID    string `json:"user_id"`
	Channel   string `json:"channel"`
	Timestamp int64  `json:"timestamp"`
	InsertID  string `json:"insert_id"`
}

func (e peerEvent) key() string {
	return strings.Join([]string{e.Name, e.UserID, strconv.FormatInt(e.Timestamp, 10), e.Channel, e.InsertID}, "\x00")
}

// peer answers as the contract says. The fields above mu are set before it starts.
type peer struct {
	before func(request int, w http.ResponseWriter) (answered bool) // may answer a POST itself
	refuse func(request, index int, e peerEvent) (code string)      // "" takes the event
	lose   bool                                                     // every tenth accepted event is not stored
	late   bool                                                     // complete_through comes late, and an event twice with it

	mu       sync.Mutex // guards what follows
	posts    int
	sizes    []int // events of each POST
	asked    int   // how often for hours
	accepted int
	stored   map[string]peerEvent
	broken   []string // bodies that are not what their headers say
}

func newPeer(t *testing.T, p *peer) (url string) {
	p.stored = map[string]peerEvent{}
	s := httptest.NewServer(p)
	t.Cleanup(s.Close)
	return s.URL
}

func (p *peer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == "/api/v1/metrics" {
		p.metrics(w, r)
		return
	}
	if r.URL.Path == "/health" {
		return
	}
	events, err := peerBody(r)
	p.mu.Lock()
	request := p.posts
	p.posts++
	p.sizes = append(p.sizes, len(events))
	if err != nil {
		p.broken = append(p.broken, err.Error())
	}
	p.mu.Unlock()
	if p.before != nil && p.before(request, w) {
		return
	}
	type failure struct {
		Index int    `json:"index"`
		Code  string `json:"code"`
		Error string `json:"error"`
	}
	errs := []failure{}
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, e := range events {
		if p.refuse != nil {
			if code := p.refuse(request, i, e); code != "" {
				errs = append(errs, failure{i, code, code + " it is"})
				continue
			}
		}
		p.accepted++
		if !p.lose || p.accepted%10 != 0 {
			p.stored[e.key()] = e
		}
	}
	status := http.StatusAccepted
	if len(errs) == len(events) {
		status = http.StatusBadRequest
	} else if len(errs) > 0 {
		status = http.StatusMultiStatus
	}
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(map[string]any{"success_count": len(events) - len(errs), "failed_count": len(errs), "errors": errs})
}

func peerBody(r *http.Request) (events []peerEvent, err error) {
	in := io.Reader(r.Body)
	if r.Header.Get("Content-Encoding") == "gzip" {
		if in, err = gzip.NewReader(r.Body); err != nil {
			return nil, err
		}
	}
	d := json.NewDecoder(in)
	if r.URL.Path == "/api/v1/events/bulk" && r.Header.Get("Content-Type") == typeJSON {
		var list struct{ Events []peerEvent }
		err = d.Decode(&list)
		return list.Events, err
	}
	for {
		var e peerEvent
		if err := d.Decode(&e); err == io.EOF {
			return events, nil
		} else if err != nil {
			return events, err
		}
		events = append(events, e)
	}
}

func (p *peer) metrics(w http.ResponseWriter, r *http.Request) {
	from, _ := strconv.ParseInt(r.FormValue("from"), 10, 64)
	to, _ := strconv.ParseInt(r.FormValue("to"), 10, 64)
	p.mu.Lock()
	defer p.mu.Unlock()
	total, users, keys := 0, map[string]bool{}, map[string]int{}
	for _, e := range p.stored {
		if e.Name == r.FormValue("event_name") && e.Timestamp >= from && e.Timestamp <= to {
			total++
			users[e.UserID] = true
			if r.FormValue("group_by") == "channel" {
				keys[e.Channel]++
			} else {
				keys[hourKey(e.Timestamp)]++
			}
		}
	}
	through := time.Now().Unix()
	if p.late && r.FormValue("group_by") == "hour" {
		if p.asked++; p.asked <= 3 {
			through -= 60
		} else {
			total++
		}
	}
	groups := []map[string]any{}
	for key, n := range keys {
		groups = append(groups, map[string]any{"key": key, "total_count": n})
	}
	json.NewEncoder(w).Encode(map[string]any{"total_count": total, "unique_users": len(users), "grouped_data": groups, "complete_through": through})
}
