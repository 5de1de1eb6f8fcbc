package admission

// ClientsMax for tests.
const ClientsMax = clientsMax

// Clients returns how many are remembered.
func (r *Rates) Clients() int { return len(r.clients) }
