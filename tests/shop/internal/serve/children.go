package serve

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/textproto"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"forkd.dev/forkd/tests/shop/internal/price"
	"forkd.dev/forkd/tests/shop/internal/who"
)

// childTimeout bounds one call, so that a dead service shows up in the tree instead of stalling it.
const childTimeout = 5 * time.Second

// child is a service that this one calls, over pooled connections as real services do.
type child struct {
	name  string
	ask   func(context.Context, who.Carriers) (who.Answer, error)
	close func()
}

// newChild connects lazily to http://, h2c:// (HTTP/2 cleartext) or grpc:// followed by host:port.
func newChild(name, address string) (child, error) {
	scheme, host, ok := strings.Cut(address, "://")
	if !ok {
		scheme, host = "http", address
	}
	switch scheme {
	case "http", "h2c":
		transport := &http.Transport{MaxIdleConnsPerHost: 16, IdleConnTimeout: 90 * time.Second, Protocols: new(http.Protocols)}
		transport.Protocols.SetHTTP1(scheme == "http")
		transport.Protocols.SetUnencryptedHTTP2(scheme == "h2c")
		ask := func(ctx context.Context, c who.Carriers) (who.Answer, error) {
			return askHTTP(ctx, transport, "http://"+host+"/", c)
		}
		return child{name, ask, transport.CloseIdleConnections}, nil
	case "grpc":
		conn, err := grpc.NewClient("dns:///"+host,
			grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithNoProxy(),
			// The default waits up to two minutes before it looks whether a service is back.
			grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, MaxDelay: time.Second}, MinConnectTimeout: time.Second}))
		if err != nil {
			return child{}, err
		}
		ask := func(ctx context.Context, c who.Carriers) (who.Answer, error) {
			return askPrice(ctx, price.Client{ClientConnInterface: conn}, c)
		}
		return child{name, ask, func() { conn.Close() }}, nil
	}
	return child{}, fmt.Errorf("cannot call %s at %q: the scheme is none of http, h2c, grpc", name, address)
}

// ask calls all children at the same time and gives their answers in their order.
func (s *Service) ask(ctx context.Context, carriers who.Carriers) []who.Answer {
	ctx, cancel := context.WithTimeout(ctx, childTimeout)
	defer cancel()
	carriers = carriers.Only(s.passOn)
	answers := make([]who.Answer, len(s.children))
	var group sync.WaitGroup
	for i, child := range s.children {
		group.Go(func() {
			answer, err := child.ask(ctx, carriers)
			if err != nil {
				answer = who.Answer{Service: child.name, Error: err.Error()}
			}
			answers[i] = answer
		})
	}
	group.Wait()
	return answers
}

func askHTTP(ctx context.Context, transport *http.Transport, url string, carriers who.Carriers) (answer who.Answer, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return answer, err
	}
	req.Header.Set("Accept", "application/json")
	for name, values := range carriers {
		req.Header[textproto.CanonicalMIMEHeaderKey(name)] = values
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return answer, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return answer, err
	}
	if resp.StatusCode != http.StatusOK {
		return answer, fmt.Errorf("%s: %.300s", resp.Status, body)
	}
	return answer, json.Unmarshal(body, &answer)
}

func askPrice(ctx context.Context, client price.Client, carriers who.Carriers) (answer who.Answer, err error) {
	reply, err := client.Get(metadata.NewOutgoingContext(ctx, metadata.MD(carriers)), new(price.Message))
	if err != nil {
		return answer, err
	}
	return answer, price.Unpack(reply, &answer)
}
