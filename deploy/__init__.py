"""How the server is deployed: images, scraping, dashboards; and the replay that checks them."""
