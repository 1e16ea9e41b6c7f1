// Command clients sends COUNT events with Segment's client for Go. Usage: clients URL KEY COUNT. It ends with 1 when the
// client gave one up.
package main

import (
	"fmt"
	"os"
	"strconv"
	"sync/atomic"
	"time"

	"gopkg.in/segmentio/analytics-go.v3"
)

// outcome counts what became of messages.
type outcome struct{ sent, givenUp atomic.Int64 }

func (o *outcome) Success(analytics.Message) { o.sent.Add(1) }
func (o *outcome) Failure(_ analytics.Message, err error) {
	fmt.Fprintln(os.Stderr, "given up:", err)
	o.givenUp.Add(1)
}

func main() {
	url, key := os.Args[1], os.Args[2]
	count, _ := strconv.Atoi(os.Args[3])
	o := new(outcome)
	client, err := analytics.NewWithConfig(key, analytics.Config{Endpoint: url, Callback: o, Interval: 500 * time.Millisecond, BatchSize: 50,
		RetryAfter: func(attempt int) time.Duration {
			return min(time.Duration(attempt+1)*500*time.Millisecond, 5*time.Second)
		}})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	for i := range count {
		err := client.Enqueue(analytics.Track{
			UserId: fmt.Sprint("u", i%50), Event: "clients",
			Properties: analytics.Properties{"n": i, "price": 1.5, "nested": map[string]any{"list": []any{1, true, nil}}},
			Context:    &analytics.Context{Campaign: analytics.CampaignInfo{Name: fmt.Sprint("c", i%7)}},
		})
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		if i%200 == 199 {
			fmt.Println(i + 1)
			time.Sleep(200 * time.Millisecond)
		}
	}
	for o.sent.Load()+o.givenUp.Load() < int64(count) { // Close would drop what has to be sent again
		time.Sleep(10 * time.Millisecond)
	}
	client.Close()
	if o.givenUp.Load() > 0 {
		os.Exit(1)
	}
}
