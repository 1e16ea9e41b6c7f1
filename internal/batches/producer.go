// Package batches bounds Kafka's batches both ways: those that are produced, by what their topic takes, and those that are read, by
// what they take in memory.
package batches

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"
)

// Producer produces to a topic in batches that it takes (max.message.bytes), also while what it takes changes: each limit has a client
// of its own, because franz-go asks for a partition's limit once. Its methods are for anybody at any time, but Run, which one calls.
type Producer struct {
	topic   string
	largest int                                       // bytes that a record may have
	newOne  func(limits kgo.Opt) (*kgo.Client, error) // makes a client
	admin   *kgo.Client                               // asks for the limits
	most    atomic.Int64                              // bytes that the topic takes of a batch, 0 while unknown
	refused chan int                                  // the limit of a batch that was too large; has room for one

	mu     sync.RWMutex // guards client; held for reading while records are handed over, so that no closed one gets any
	client *kgo.Client  // admin while nothing else is known

	looking sync.Mutex     // guards limits, and held by a look
	limits  map[string]int // of the topic and its side topics, as far as they are known; replaced as a whole
}

const (
	// usualLimit is how large a batch is at the most, whatever its topic takes: Kafka's default, in bytes.
	usualLimit = 1_000_012
	// leastLimit ends the halving of a limit that this user may not see.
	leastLimit = 1 << 10
	// lookEvery is the time between two looks at what the topics take.
	lookEvery = 10 * time.Second
	// noneRefused is in place of a limit.
	noneRefused = -1
)

// NewProducer returns a producer of records of so many bytes at the most. It produces by the client admin, which stays the caller's,
// until the limit is known, then by clients that newOne makes with the option that it is given.
func NewProducer(topic string, largest int, admin *kgo.Client, newOne func(limits kgo.Opt) (*kgo.Client, error)) *Producer {
	return &Producer{topic: topic, largest: largest, admin: admin, client: admin, newOne: newOne, refused: make(chan int, 1)}
}

// Most is how many bytes the topic takes of a batch, and so of a record with what is around it; 0 while that is unknown.
func (p *Producer) Most() int { return int(p.most.Load()) }

// Hand calls over with the client to produce with, which is good until over returns. It returns the limit that batches keep.
func (p *Producer) Hand(over func(*kgo.Client)) (limit int) {
	p.mu.RLock()
	defer p.mu.RUnlock()
	over(p.client)
	return p.Most()
}

// TooLarge is told that the brokers have refused a batch for its size, which kept that limit. It does not wait.
func (p *Producer) TooLarge(limit int) {
	select {
	case p.refused <- limit:
	default: // one is enough
	}
}

// Run looks at the limits now and then, and at once when a batch was refused, until ctx is done. noted gets each outcome.
func (p *Producer) Run(ctx context.Context, noted func(error)) {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		refused := noneRefused
		select {
		case refused = <-p.refused:
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		if err := p.look(ctx, refused); ctx.Err() == nil {
			noted(err)
		}
	}
}

// Look asks what the topics take and keeps to it.
func (p *Producer) Look(ctx context.Context) error { return p.look(ctx, noneRefused) }

// look is Look after a batch was refused that kept a limit, or noneRefused: a limit that this user may not see is found by halving.
func (p *Producer) look(ctx context.Context, refused int) error {
	p.looking.Lock()
	defer p.looking.Unlock()
	limits, err := p.ask(ctx)
	if err != nil {
		return err
	}
	now := p.Most()
	most := cmp.Or(limits[p.topic], now)
	if limits[p.topic] == 0 && refused == now { // else it was another limit's
		most = max(int(batchBytes(now))/2, leastLimit)
	}
	if most != 0 {
		limits[p.topic] = most
	}
	for topic, n := range limits {
		p.tell(topic, cmp.Or(p.limits[topic], p.largest), n)
	}
	if p.limits = limits; batchBytes(most) == batchBytes(now) { // the client is as good as another one
		p.most.Store(int64(most))
		return nil
	}
	client, err := p.newOne(within(limits))
	if err != nil {
		return fmt.Errorf("set up the producer for batches of %d bytes: %w", most, err)
	}
	p.mu.Lock()
	old := p.client
	p.client = client
	p.most.Store(int64(most))
	p.mu.Unlock()
	if old != p.admin {
		go func() { // ends with the last acknowledgement, which has a time limit
			old.Flush(context.Background())
			old.Close()
		}()
	}
	return nil
}

// follows is what follows from a limit below the largest record, of the topic and its side topics by their suffix.
var follows = map[string]string{
	"":       "larger events are refused for good, by 413 or an entry of the answer's errors",
	".retry": "larger rows that ClickHouse rejects are dead letters at once",
	".dlq":   "larger dead letters are cut",
}

// ask returns what the topics take. One whose configuration this user may not see is left out.
func (p *Producer) ask(ctx context.Context) (map[string]int, error) {
	var topics []string
	for suffix := range follows {
		topics = append(topics, p.topic+suffix)
	}
	described, err := kadm.NewClient(p.admin).DescribeTopicConfigs(ctx, topics...)
	if errors.As(err, new(*kadm.AuthError)) {
		return map[string]int{}, nil
	} else if err != nil && len(described) == 0 {
		return nil, fmt.Errorf("ask Kafka for max.message.bytes of topic %s: %w", p.topic, err)
	}
	limits := map[string]int{}
	for _, topic := range described {
		for _, c := range topic.Configs {
			if n, err := strconv.Atoi(c.MaybeValue()); c.Key == "max.message.bytes" && err == nil && n > 0 {
				limits[topic.Name] = n
			}
		}
	}
	return limits, nil
}

// tell says what follows from a limit below the largest record, and when it is gone.
func (p *Producer) tell(topic string, before, n int) {
	switch {
	case n < p.largest && n != before:
		slog.Warn(fmt.Sprintf("the topic takes less than the %d KiB that an event may have: %s", p.largest>>10, follows[topic[len(p.topic):]]), "topic", topic, "max.message.bytes", n)
	case n >= p.largest && before < p.largest:
		slog.Info("the topic takes the largest events again", "topic", topic, "max.message.bytes", n)
	}
}

// Limits is the option of a client that produces to these topics, by what is known of them.
func (p *Producer) Limits() kgo.Opt {
	p.looking.Lock()
	defer p.looking.Unlock()
	return within(p.limits)
}

func within(limits map[string]int) kgo.Opt {
	return kgo.ProducerBatchMaxBytesFn(func(topic string) int32 { return batchBytes(limits[topic]) })
}

// batchBytes is how large a batch may be for a topic that takes so many bytes, 0 when that is unknown.
func batchBytes(limit int) int32 {
	const least = 512 // franz-go's
	return int32(max(min(cmp.Or(limit, usualLimit), usualLimit), least))
}

// Close ends the current client; what that has not sent is not acknowledged.
func (p *Producer) Close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.client.Close()
}
